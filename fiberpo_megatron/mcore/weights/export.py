"""Export: full Hugging Face tensors on rank 0, a bucket at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fiberpo_megatron.mcore.families.transforms import Dimensions, Shape
from fiberpo_megatron.mcore.families.weight_tables import Family, family_of, fill
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.mcore.weights.local import LocalWeight, WeightLayout, local_weights

DEFAULT_BUCKET_BYTES = 64 * 2**20
_ALIGNMENT = 16
"""Bytes to which every shard in a message is aligned, so that it can be viewed in its type."""


@dataclass(frozen=True)
class _Piece:
    """One shard as its owner describes it."""

    name: str
    shard: int
    rank: int
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def padded_bytes(self) -> int:
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT


Parameter = list[_Piece]
"""All shards of one parameter, in order."""


def export_hf(
    model_chunks: Sequence[nn.Module],
    hf_config: Mapping[str, object],
    layout: WeightLayout,
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and full tensors in a fixed order (embedding, layers, norm, output), one at a time.

    Every rank iterates to the end. Rank 0 gets the tensors, on the model's device and not sharing memory with
    it; other ranks get empty ones of the same type. Floating-point tensors are cast to `dtype` when given.
    Rank 0 holds about `bucket_bytes` of foreign shards at a time. Parameters have to be whole: finish an
    overlapped parameter gather first. Raises ValueError for a family without a table.
    """
    dims = Dimensions.from_hf(hf_config)
    family = family_of(hf_config, dims)
    own = {weight.name: weight for weight in local_weights(model_chunks, family, dims, layout) if weight.rule.exported}
    plan = _plan(list(own.values()), family, layout, dtype)
    for bucket in _buckets(plan, bucket_bytes):
        shards = _collect(bucket, own, layout.rank)
        for parameter in bucket:
            described = family.rule_of(parameter[0].name)
            assert described is not None
            rule, match = described
            names = [fill(template, match) for template in rule.hf]
            if layout.rank == 0:
                yield from zip(names, rule.transform.merge([shards[piece] for piece in parameter], dims), strict=True)
            else:
                yield from ((name, torch.empty(0, dtype=parameter[0].dtype)) for name in names)


def _plan(
    own: Sequence[LocalWeight], family: Family, layout: WeightLayout, dtype: torch.dtype | None
) -> list[Parameter]:
    """All parameters of the model with the owners of their shards: of equal replicas, the lowest rank."""
    first_replica = layout.data_rank == 0 and layout.context_rank == 0
    pieces = [
        _Piece(w.name, w.shard.rank, layout.rank, tuple(w.tensor.shape), _exported_type(w.tensor, dtype))
        for w in own
        if first_replica or w.match.expert is not None  # experts are spread over the data-parallel ranks
    ]
    if layout.world_size > 1:
        told = [[p.name, p.shard, p.rank, p.shape, str(p.dtype).removeprefix("torch.")] for p in pieces]
        gathered = exchange.all_gather_json(told, layout.host_group)
        dist.barrier()  # NCCL: every rank joins the group's first operation; later ones are between few
        pieces = [
            _Piece(name, shard, rank, tuple(shape), getattr(torch, kind))
            for part in gathered
            for name, shard, rank, shape, kind in part
        ]
    owners: dict[str, dict[int, _Piece]] = {}
    for piece in pieces:
        owners.setdefault(piece.name, {}).setdefault(piece.shard, piece)
    return [[owners[name][i] for i in sorted(owners[name])] for name in sorted(owners, key=family.position)]


def _exported_type(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _buckets(plan: Sequence[Parameter], bucket_bytes: int) -> Iterator[list[Parameter]]:
    """Consecutive parameters of at most `bucket_bytes` together; a larger one is alone."""
    bucket: list[Parameter] = []
    size = 0
    for parameter in plan:
        nbytes = sum(piece.nbytes for piece in parameter)
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes
    if bucket:
        yield bucket


def _collect(bucket: Sequence[Parameter], own: Mapping[str, LocalWeight], rank: int) -> dict[_Piece, Tensor]:
    """On rank 0 all shards of a bucket; other owners send theirs in one message each and get nothing."""
    by_owner: dict[int, list[_Piece]] = {}
    for parameter in bucket:
        for piece in parameter:
            by_owner.setdefault(piece.rank, []).append(piece)
    mine = {piece: own[piece.name].tensor.detach().to(piece.dtype) for piece in by_owner.pop(rank, [])}
    if rank != 0:
        if mine:
            _exchange([dist.P2POp(dist.isend, _packed(mine), 0)])
        return {}
    device = next(iter(own.values())).tensor.device
    messages = {
        owner: torch.empty(sum(piece.padded_bytes for piece in pieces), dtype=torch.uint8, device=device)
        for owner, pieces in by_owner.items()
    }
    _exchange([dist.P2POp(dist.irecv, message, owner) for owner, message in messages.items()])
    for owner, pieces in by_owner.items():
        mine.update(zip(pieces, _unpacked(messages[owner], pieces), strict=True))
    return mine


def _exchange(operations: list[dist.P2POp]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def _packed(shards: Mapping[_Piece, Tensor]) -> Tensor:
    """All shards as bytes behind each other, each padded to the alignment."""
    parts = []
    for piece, tensor in shards.items():
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
        parts.append(parts[-1].new_zeros(piece.padded_bytes - piece.nbytes))
    return torch.cat(parts)


def _unpacked(message: Tensor, pieces: Sequence[_Piece]) -> Iterator[Tensor]:
    start = 0
    for piece in pieces:
        yield message[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
        start += piece.padded_bytes
