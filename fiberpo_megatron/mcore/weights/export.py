"""Gives rank 0 the full Hugging Face tensors of a model, a bucket at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fiberpo_megatron.mcore.families import WeightTable, family_of
from fiberpo_megatron.mcore.families.transforms import Shape
from fiberpo_megatron.mcore.families.weight_tables import fill
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.mcore.weights.local import LocalWeight, WeightLayout, local_weights

DEFAULT_BUCKET_BYTES = 64 * 2**20
_ALIGNMENT = 16
"""Every shard in a message starts at a multiple of this many bytes, so that it can be viewed in its type."""


@dataclass(frozen=True)
class _Piece:
    """Describes one shard, as its owner announces it to all ranks."""

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
"""This is the list of all shards of one parameter, in order."""


def export_hf(
    model_chunks: Sequence[nn.Module],
    hf_config: Mapping[str, object],
    layout: WeightLayout,
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face names and full tensors in a fixed order (embedding, layers, norm, output), one at a time.

    Every rank must iterate to the end. Rank 0 gets the tensors on the model's device; they do not share memory with
    the model. Other ranks get empty tensors of the same type. Floating-point tensors are cast to `dtype` when it is
    given. Rank 0 holds about `bucket_bytes` of other ranks' shards at a time. Parameters have to be whole: finish an
    overlapped parameter gather first. Raises ValueError for a config.json whose family is not known.
    """
    family = family_of(hf_config)
    architecture = family.read_architecture(hf_config)
    table = family.weights.for_model(architecture)
    own = {weight.name: weight for weight in local_weights(model_chunks, table, layout) if weight.rule.exported}
    plan = _plan(list(own.values()), table, layout, dtype)
    for bucket in _buckets(plan, bucket_bytes):
        shards = _collect(bucket, own, layout.rank)
        for parameter in bucket:
            described = table.rule_of(parameter[0].name)
            assert described is not None
            rule, match = described
            names = [fill(template, match) for template in rule.hf]
            if layout.rank == 0:
                merged = rule.transform.merge([shards[piece] for piece in parameter], architecture)
                yield from zip(names, merged, strict=True)
            else:
                yield from ((name, torch.empty(0, dtype=parameter[0].dtype)) for name in names)


def _plan(
    own: Sequence[LocalWeight], table: WeightTable, layout: WeightLayout, dtype: torch.dtype | None
) -> list[Parameter]:
    """Return all parameters of the model with the owners of their shards: the lowest rank among equal replicas."""
    first_replica = layout.data_rank == 0 and layout.context_rank == 0
    pieces = [
        _Piece(w.name, w.shard.rank, layout.rank, tuple(w.tensor.shape), _exported_type(w.tensor, dtype))
        for w in own
        if first_replica or w.match.expert is not None  # experts are spread over the data-parallel ranks
    ]
    if layout.world_size > 1:
        described = [[p.name, p.shard, p.rank, p.shape, str(p.dtype).removeprefix("torch.")] for p in pieces]
        gathered = exchange.all_gather_json(described, layout.host_group)
        dist.barrier()  # NCCL needs every rank in the group's first operation; only a few take part in the later ones
        pieces = [
            _Piece(name, shard, rank, tuple(shape), getattr(torch, kind))
            for part in gathered
            for name, shard, rank, shape, kind in part
        ]
    owners: dict[str, dict[int, _Piece]] = {}
    for piece in pieces:
        owners.setdefault(piece.name, {}).setdefault(piece.shard, piece)
    return [[owners[name][i] for i in sorted(owners[name])] for name in sorted(owners, key=table.position)]


def _exported_type(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _buckets(plan: Sequence[Parameter], bucket_bytes: int) -> Iterator[list[Parameter]]:
    """Yield consecutive parameters of at most `bucket_bytes` together; a larger parameter has a bucket of its own."""
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
    """Return all shards of a bucket on rank 0; other owners send theirs in one message each and return nothing."""
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
    """Return the bytes of all shards one after the other, each padded to the alignment."""
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
