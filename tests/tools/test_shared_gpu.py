"""The backend for ranks that share a GPU gives what gloo gives on the host, and a layout computes the same with it."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from fiberpo_megatron.certify.processes import RanksFailed, run_ranks
from fiberpo_megatron.certify.training_step import compare, run_rank, run_reference
from tools import layout_parity
from tools.shared_gpu import StagedGroup, _reduction, register

SIZE = 3
OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
Results = list[Tensor]
"""What one rank holds after an operation."""


def values(*shape: int, dtype: torch.dtype = torch.float32, extra: int = 0) -> Tensor:
    """Small whole numbers, other ones on every rank: sums of them are exact in any type and any order."""
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + extra)
    return torch.randint(1, 5, shape, generator=generator).to(dtype)


def all_reduce_sum(group: Any) -> Results:
    tensors = [values(2, 3, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64)]
    for tensor in [*tensors, scalar := torch.tensor(float(dist.get_rank()))]:
        dist.all_reduce(tensor, group=group)
    return [*tensors, scalar]


def all_reduce_async(group: Any) -> Results:
    first, second = values(5), values(7, extra=1)
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in (first, second)]
    for work in reversed(works):
        work.wait()
    return [first, second]


def reduce(group: Any) -> Results:
    tensor = values(4)
    dist.reduce(tensor, dst=1, group=group)
    return [tensor] if dist.get_rank() == 1 else []


def broadcast(group: Any) -> Results:
    tensors = [values(3, dtype=torch.bfloat16), values(2, 2) > 2]
    for tensor in tensors:
        dist.broadcast(tensor, src=2, group=group)
    return tensors


def all_gather(group: Any) -> Results:
    outs = [torch.empty(2, 2, dtype=torch.bfloat16) for _ in range(SIZE)]
    dist.all_gather(outs, values(2, 2, dtype=torch.bfloat16), group=group)
    return outs


def all_gather_into_tensor(group: Any) -> Results:
    out, later = torch.empty(SIZE * 2, 3), torch.empty(SIZE * 2)
    work = dist.all_gather_into_tensor(later, values(2, extra=1), group=group, async_op=True)
    dist.all_gather_into_tensor(out, values(2, 3), group=group)
    work.wait()
    return [out, later]


def reduce_scatter_tensor(group: Any) -> Results:
    out = torch.empty(2, 3)
    dist.reduce_scatter_tensor(out, values(SIZE * 2, 3), group=group)
    return [out]


def reduce_scatter(group: Any) -> Results:
    out = torch.empty(2)
    dist.reduce_scatter(out, list(values(SIZE, 2)), group=group)
    return [out]


def all_to_all_single(group: Any) -> Results:
    rank = dist.get_rank()
    outgoing = [(rank + peer) % SIZE for peer in range(SIZE)]  # a symmetric matrix of rows, some of them none
    out = torch.empty(sum(outgoing), 2)
    dist.all_to_all_single(out, values(sum(outgoing), 2), outgoing, outgoing, group=group)
    even = torch.empty(SIZE * 2, dtype=torch.int64)
    dist.all_to_all_single(even, values(SIZE * 2, dtype=torch.int64), group=group, async_op=True).wait()
    return [out, even]


def gather_and_scatter(group: Any) -> Results:
    root = dist.get_rank() == 1
    outs = [torch.empty(3) for _ in range(SIZE)] if root else None
    dist.gather(values(3), outs, dst=1, group=group)
    out = torch.empty(2)
    dist.scatter(out, list(values(SIZE, 2)) if root else None, src=1, group=group)
    return [*(outs or []), out]


def ring(group: Any) -> Results:
    """Both directions at once, two messages to each neighbour, as in a pipeline and in context parallelism."""
    rank = dist.get_rank()
    after, before = (rank + 1) % SIZE, (rank - 1) % SIZE
    received = [torch.empty(4, dtype=torch.bfloat16) for _ in range(4)]
    sent = [values(4, dtype=torch.bfloat16, extra=number) for number in range(4)]
    ops = [
        dist.P2POp(dist.isend, sent[0], after, group),
        dist.P2POp(dist.irecv, received[0], before, group),
        dist.P2POp(dist.isend, sent[1], after, group),
        dist.P2POp(dist.irecv, received[1], before, group),
        dist.P2POp(dist.isend, sent[2], before, group),
        dist.P2POp(dist.irecv, received[2], after, group),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    if rank == 0:
        dist.send(sent[3], 1, group=group)
    elif rank == 1:
        dist.recv(received[3], 0, group=group)
    return received[:3] + (received[3:] if rank == 1 else [])


def objects(group: Any) -> Results:
    found: list[Any] = [None] * SIZE
    dist.all_gather_object(found, {"rank": dist.get_rank()}, group=group)
    shared = [{"from": dist.get_rank()}]
    dist.broadcast_object_list(shared, src=2, group=group)
    return [torch.tensor([one["rank"] for one in found] + [shared[0]["from"]])]


def in_a_smaller_group(group: Any) -> Results:
    """`group` is unused but for its kind: the ranks 0 and 2 have one of their own."""
    smaller = dist.new_group([0, 2], backend=dist.get_backend(group))
    tensor = values(3)
    if dist.get_rank() != 1:
        dist.all_reduce(tensor, group=smaller)
        dist.broadcast(tensor[:1], src=2, group=smaller)
    return [tensor]


BOTH: dict[str, Callable[[Any], Results]] = {
    function.__name__: function
    for function in (
        all_reduce_sum,
        all_reduce_async,
        reduce,
        broadcast,
        all_gather,
        all_gather_into_tensor,
        reduce_scatter_tensor,
        reduce_scatter,
        all_to_all_single,
        gather_and_scatter,
        ring,
        objects,
        in_a_smaller_group,
    )
}


def start() -> tuple[Any, Any]:
    """The staged group of all ranks, which is the default one, and a group of gloo."""
    dist.init_process_group(register())
    return dist.group.WORLD, dist.new_group(backend="gloo")


def every_operation() -> dict[str, tuple[Results, Results]]:
    """What this rank gets from the staged group and from gloo."""
    staged, gloo = start()
    assert type(staged) is StagedGroup and dist.get_backend(staged) == "staged"
    dist.barrier()
    return {name: (function(staged), function(gloo)) for name, function in BOTH.items()}


def beyond_gloo() -> dict[str, tuple[Results, Results]]:
    """What this rank gets from the staged group, and what it should, of operations that gloo lacks or refuses."""
    staged, gloo = start()
    rank = dist.get_rank()
    everyone = [torch.empty(SIZE * 4, dtype=torch.int64) for _ in range(SIZE)]
    dist.all_gather(everyone, values(SIZE * 4, dtype=torch.int64), group=gloo)
    stacked = torch.stack(everyone)
    found: dict[str, tuple[Results, Results]] = {}

    def bits(pair: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total = stacked[0]
        for row in stacked[1:]:
            total = pair(total, row)
        return total

    wanted = {
        "SUM": stacked.sum(0),
        "AVG": stacked.double().mean(0),
        "PRODUCT": stacked.prod(0),
        "MIN": stacked.amin(0),
        "MAX": stacked.amax(0),
        "BAND": bits(torch.bitwise_and),
        "BOR": bits(torch.bitwise_or),
        "BXOR": bits(torch.bitwise_xor),
    }
    for name in OPS:
        mine = stacked[rank].double() if name == "AVG" else stacked[rank].clone()
        dist.all_reduce(mine, op=getattr(dist.ReduceOp, name))
        found[name] = [mine], [wanted[name]]

    mine = [stacked[rank].float(), stacked[rank].bfloat16()]
    with _coalescing_manager(async_ops=True) as together:
        for one in mine:
            dist.all_reduce(one)
    together.wait()
    found["coalesced all-reduce"] = mine, [wanted["SUM"].float(), wanted["SUM"].bfloat16()]
    outs = [torch.empty(SIZE * SIZE * 4), torch.empty(SIZE * 4)]
    with _coalescing_manager(async_ops=True) as together:
        dist.all_gather_into_tensor(outs[0], stacked[rank].float())
        dist.all_gather_into_tensor(outs[1], stacked[rank, :4].float())
    together.wait()
    found["coalesced all-gather"] = outs, [stacked.float().flatten(), stacked[:, :4].float().flatten()]
    outs = [torch.empty(4), torch.empty(1)]
    with _coalescing_manager():
        dist.reduce_scatter_tensor(outs[0], stacked[rank].float())
        dist.reduce_scatter_tensor(outs[1], stacked[rank, :SIZE].float())
    own = slice(rank * 4, rank * 4 + 4)
    found["coalesced reduce-scatter"] = outs, [wanted["SUM"][own].float(), wanted["SUM"][rank : rank + 1].float()]

    sizes = list(range(1, SIZE + 1))
    out = torch.empty(sizes[rank])
    dist.reduce_scatter(out, list(stacked[rank, : sum(sizes)].float().split(sizes)))
    found["uneven reduce-scatter"] = [out], [wanted["SUM"][: sum(sizes)].float().split(sizes)[rank]]
    parts = [torch.empty(size) for size in sizes]
    dist.all_gather(parts, stacked[rank, : sizes[rank]].float())
    found["uneven all-gather"] = parts, [stacked[other, : sizes[other]].float() for other in range(SIZE)]
    listed = [torch.empty(4) for _ in range(SIZE)]
    dist.all_to_all(listed, list(stacked[rank].float().split(4)))
    found["all-to-all of lists"] = listed, [row[own].float() for row in stacked]

    sent, received = stacked[rank].clone(), torch.empty_like(stacked[rank])
    with _coalescing_manager(device=torch.device("cpu"), async_ops=True) as together:
        dist.isend(sent, (rank + 1) % SIZE)
        dist.irecv(received, (rank - 1) % SIZE)
    sent.zero_()  # it was copied when it was sent
    together.wait()
    found["coalesced messages"] = [received], [stacked[(rank - 1) % SIZE]]

    # torch 2.11 calls these five
    group: Any = staged
    whole, piece, swapped = torch.empty(SIZE * SIZE * 4), torch.empty(4), torch.empty(SIZE * 4)
    group._allgather_base(whole, stacked[rank].float()).wait()
    group._reduce_scatter_base(piece, stacked[rank].float()).wait()
    group.alltoall_base(swapped, stacked[rank].float(), [], []).wait()
    found["names of 2.11"] = (
        [whole, piece, swapped],
        [stacked.float().flatten(), wanted["SUM"][own].float(), stacked[:, own].float().flatten()],
    )
    group.allgather_into_tensor_coalesced([whole], [stacked[rank].double().float()]).wait()
    group.reduce_scatter_tensor_coalesced([piece], [stacked[rank].float()]).wait()
    found["coalesced names of 2.11"] = [whole, piece], [stacked.float().flatten(), wanted["SUM"][own].float()]
    return found


def late_tensors() -> tuple[Tensor, Tensor]:
    """A tensor before and after somebody waits for it."""
    dist.init_process_group(register())
    tensor = torch.ones(3)
    work = dist.all_reduce(tensor, async_op=True)
    dist.barrier()
    before = tensor.clone()
    work.wait()
    return before, tensor


def narrow_sum() -> Tensor:
    """256 + 1 + 1 is 256 where bfloat16 is rounded after each addend, and 258 where it is rounded once."""
    dist.init_process_group(register())
    tensor = torch.tensor([256.0 if dist.get_rank() == 0 else 1.0], dtype=torch.bfloat16)
    dist.all_reduce(tensor)
    return tensor


def too_small() -> None:
    dist.init_process_group(register())
    dist.all_gather_into_tensor(torch.empty(5), torch.ones(3))


def strided() -> None:
    dist.init_process_group(register())
    dist.all_reduce(torch.ones(3, 2).t())


def assert_equal(ranks: list[dict[str, tuple[Results, Results]]]) -> None:
    for rank, found in enumerate(ranks):
        for name, (staged, wanted) in found.items():
            assert len(staged) == len(wanted), name
            for mine, other in zip(staged, wanted):
                assert mine.dtype == other.dtype, name
                assert torch.equal(mine, other), f"{name} on rank {rank}: {mine} instead of {other}"


def test_every_operation_gives_what_gloo_gives():
    ranks = run_ranks(SIZE, every_operation)
    assert_equal(ranks)
    assert all(found.keys() == BOTH.keys() for found in ranks)


def test_operations_that_gloo_does_not_have():
    assert_equal(run_ranks(SIZE, beyond_gloo))


def test_a_result_is_there_only_after_waiting():
    for before, after in run_ranks(2, late_tensors):
        assert before.tolist() == [1, 1, 1] and after.tolist() == [2, 2, 2]


def test_half_precision_is_rounded_once():
    assert [one.tolist() for one in run_ranks(SIZE, narrow_sum)] == [[258.0]] * SIZE


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(RanksFailed, match=r"24 bytes arrived for a tensor \[5\] of torch.float32, which has 20"):
        run_ranks(2, too_small)
    with pytest.raises(RanksFailed, match=r"\[2, 3\] with strides \[1, 2\] is not contiguous"):
        run_ranks(1, strided)
    with pytest.raises(ValueError, match="PREMUL_SUM is not known; use one of"):
        _reduction(SimpleNamespace(reduceOp=dist.ReduceOp.RedOpType.PREMUL_SUM))


@pytest.mark.parametrize("layout", [["--tensor", "2"], ["--data", "2", "--expert", "2", "--dtype", "bfloat16"]])
def test_a_layout_computes_the_same(layout: list[str]):
    """Two addends have one sum in any order, so that the bits are equal."""
    case = layout_parity.case_of(layout)
    case = replace(case, steps=1)
    old = dict.fromkeys(range(len(case.problem.rollouts.tokens)), -4.0)
    arguments = case, old, (case.micro_batch_tokens,)
    plain = run_ranks(2, run_rank, *arguments)
    for (mine,), (other,) in zip(run_ranks(2, layout_parity.run_rank_on_shared_gpu, *arguments), plain):
        assert len(mine.log_probs) and np.array_equal(mine.log_probs, other.log_probs)
        for name in ("gradient", "parameters"):
            pairs = zip(getattr(mine, name), getattr(other, name))
            assert all(a[:3] == b[:3] and np.array_equal(a[3], b[3]) for a, b in pairs), name


def test_a_layout_in_bfloat16_is_near_float64():
    """bfloat16 has 8 bits: a weight is off by at most 1/512 of itself, and an optimiser step moves each by 0.01. The
    sums behind log-probs and gradients are longer, and take several such errors."""
    words = ["--model", "dense", "--dtype", "bfloat16", "--objective", "reinforce", "--steps", "2"]
    case = layout_parity.case_of(words)
    (reference,) = run_ranks(1, run_reference, case, on_cpu=True)
    old = dict(zip(reference.index.tolist(), reference.old_log_probs.tolist()))
    ((outcome,),) = run_ranks(1, run_rank, case, old, (case.micro_batch_tokens,))
    found, _ = compare(reference, [outcome])
    largest = {name: one.relative for name, one in found.items()}
    assert 1e-4 < largest["log_probs"] < 0.02, "it is not bfloat16, or not near"
    assert largest["gradient"] < 0.15 and largest["parameters"] < 0.015, largest
