"""The CPU platform's packed rows: attention against plain attention per sequence, for every context-parallel cut."""

import pytest
import torch
import torch.nn.functional as F

from fiberpo_megatron.data.packing import zigzag
from fiberpo_megatron.mcore.cpu import attention
from fiberpo_megatron.mcore.cpu.packed import PackedRow

LENGTHS = [4, 24, 4, 8, 12, 4, 40]
HEADS, GROUPS, SIZE = 4, 2, 8


class Group:
    """As much of a process group as the attention asks for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def row(context_rank: int, context_size: int) -> PackedRow:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return PackedRow(bounds, max(LENGTHS), context_rank, context_size)


def local(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return torch.cat([part[zigzag(len(part), rank, size)] for part in x.split(LENGTHS)])


def plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    parts = []
    for q, k, v in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS)):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


@pytest.mark.parametrize("size", [1, 2])
def test_attention(size: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    query = torch.randn(total, HEADS, SIZE, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(total, GROUPS, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wanted = plainly(query, key, value)
    probe = torch.randn_like(wanted)
    wanted_gradient = torch.autograd.grad((wanted * probe).sum(), (query, key, value))

    def everywhere(x: torch.Tensor, group: Group) -> torch.Tensor:
        whole = key if x.data_ptr() == at["key"] else value
        return torch.cat([local(whole, rank, size) for rank in range(size)])

    at: dict[str, int] = {}
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", everywhere)
    module = attention.PackedAttention.__new__(attention.PackedAttention)
    torch.nn.Module.__init__(module)
    module.context_group, module.softmax_scale = Group(size), None
    value_sum = torch.zeros((), dtype=torch.float64)
    for rank in range(size):
        mine = [local(x[:, None], rank, size) for x in (query, key, value)]
        at["key"] = mine[1].data_ptr()
        out = module(*mine, None, packed_seq_params=row(rank, size)).squeeze(1)
        torch.testing.assert_close(out, local(wanted, rank, size))
        value_sum = value_sum + (out * local(probe, rank, size)).sum()
    for one, other in zip(torch.autograd.grad(value_sum, (query, key, value)), wanted_gradient):
        torch.testing.assert_close(one, other)


def test_similar_lengths_share_a_call():
    buckets, place = row(0, 1).layout
    assert len(buckets) < len(set(LENGTHS))
    assert sum(bucket.sequences for bucket in buckets) == len(LENGTHS)
    slots = sum(len(bucket.queries) for bucket in buckets)
    assert slots <= 1.5 * sum(LENGTHS)
    assert sorted(set(place.tolist())) == sorted(place.tolist()) and len(place) == sum(LENGTHS)


def test_platform_is_the_cpu_one():
    from fiberpo_megatron.mcore.platform import activate

    expected = "gpu" if torch.cuda.is_available() else "cpu"
    assert activate() is activate() and activate().name == expected
