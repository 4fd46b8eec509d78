"""Brings the full Hugging Face tensors of a model out of its shards, on rank 0 or spread over all ranks."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fiberpo_megatron.interfaces import NamedShape
from fiberpo_megatron.mcore.families import Rule, family_of
from fiberpo_megatron.mcore.families.transforms import Shape
from fiberpo_megatron.mcore.families.weight_tables import fill
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.mcore.weights.local import LocalWeight, WeightLayout, local_weights

DEFAULT_BUCKET_BYTES = 64 * 2**20
_ALIGNMENT = 16
"""Every shard in a message starts at a multiple of this many bytes, so that it can be viewed in its type."""


@dataclass(frozen=True)
class _Piece:
    """Describes one shard and the ranks that hold it, which are replicas of each other."""

    name: str
    shard: int
    ranks: tuple[int, ...]
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


@dataclass(frozen=True)
class _Bucket:
    """Holds parameters that are put together on one rank, the home, out of the shards of one replica."""

    parameters: Sequence[Parameter]
    home: int
    replica: int = 0

    def by_owner(self) -> dict[int, list[_Piece]]:
        """Return the shards that each rank contributes."""
        found: dict[int, list[_Piece]] = {}
        for parameter in self.parameters:
            for piece in parameter:
                found.setdefault(piece.ranks[self.replica], []).append(piece)
        return found


class Export:
    """Gives out the weights of a Megatron model under Hugging Face names.

    Every rank must construct one, because the ranks tell each other which shards they hold. What this finds (names,
    shapes, owners and buckets) is kept, so that later exports only move the weights. `layout` is the parallel layout;
    floating-point tensors are cast to `dtype` when it is given; a rank holds about `bucket_bytes` of other ranks'
    shards at a time. Raises ValueError for a config.json whose family is not known.
    """

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        hf_config: Mapping[str, object],
        layout: WeightLayout,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        family = family_of(hf_config)
        self._architecture = family.read_architecture(hf_config)
        self._table = family.weights.for_model(self._architecture)
        self._layout, self._dtype, self._bucket_bytes = layout, dtype, bucket_bytes
        found = local_weights(model_chunks, self._table, layout)
        self._own = {weight.name: weight for weight in found if weight.rule.exported}
        self._rules: dict[str, tuple[Rule, list[str]]] = {}
        self._homes: dict[int, list[list[_Bucket]]] = {}
        self._rounds: dict[int, list[list[list[NamedShape]]]] = {}
        self._parameters = self._announced()

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and full tensors in a fixed order (embedding, layers, norm, output), one at a time.

        Every rank must iterate to the end. Rank 0 gets the tensors on the model's device; they do not share memory
        with the model. Other ranks get empty tensors of the same type. Parameters have to be whole: finish an
        overlapped parameter gather first.
        """
        for bucket in self._on_rank_0:
            shards = self._collect(bucket)
            for parameter in bucket.parameters:
                if self._layout.rank == 0:
                    yield from self._merged(parameter, shards)
                else:
                    names = (shape.name for shape in self._described(parameter))
                    yield from ((name, torch.empty(0, dtype=parameter[0].dtype)) for name in names)

    def share(self, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the names and full tensors that fall to this rank, a list for each round; no tensor falls to two ranks.

        Every rank must iterate to the end, a round at a time. Only ranks that hold parts of the same tensor
        communicate: those of one tensor-parallel group. A round has about `limit` bytes, all ranks together. The
        tensors are on the model's device and do not share memory with the model.
        """
        for buckets in self._spread(limit):
            mine: list[tuple[str, Tensor]] = []
            for bucket in buckets:
                shards = self._collect(bucket)
                if self._layout.rank == bucket.home:
                    mine += (tensor for parameter in bucket.parameters for tensor in self._merged(parameter, shards))
            yield mine

    def rounds(self, limit: int) -> list[list[list[NamedShape]]]:
        """Return the tensors that `share` yields, by round and rank, in order."""
        if limit not in self._rounds:
            found: list[list[list[NamedShape]]] = []
            for buckets in self._spread(limit):
                found.append([[] for _ in range(self._layout.world_size)])
                for bucket in buckets:
                    found[-1][bucket.home] = [one for each in bucket.parameters for one in self._described(each)]
            self._rounds[limit] = found
        return self._rounds[limit]

    def _announced(self) -> list[Parameter]:
        """Return all parameters of the model in order, with the ranks that hold each shard.

        Ranks that hold the same shards announce the same digest, and only the first of them sends the list.
        """
        layout = self._layout
        experts = [w for w in self._own.values() if w.match.expert is not None]
        others = [w for w in self._own.values() if w.match.expert is None]
        lists = [self._listed(weights) for weights in (others, experts)]
        gathered: list[tuple[tuple[str, int, Shape, str], tuple[int, ...]]]
        if layout.world_size == 1:
            gathered = [(entry, (0,)) for entries in lists for entry in entries]
        else:
            digests = [hashlib.sha256(json.dumps(entries).encode()).hexdigest() for entries in lists]
            of_all = exchange.all_gather_json(digests, layout.host_group)
            holders: list[dict[str, list[int]]] = [{}, {}]
            for rank, both in enumerate(of_all):
                for kind, digest in enumerate(both):
                    holders[kind].setdefault(digest, []).append(rank)
            mine = [
                entries if holders[kind][digests[kind]][0] == layout.rank else [] for kind, entries in enumerate(lists)
            ]
            sent = exchange.all_gather_json(mine, layout.host_group)
            gathered = [
                (entry, tuple(ranks))
                for kind, of_kind in enumerate(holders)
                for ranks in of_kind.values()
                for entry in sent[ranks[0]][kind]
            ]
            dist.barrier()  # NCCL needs every rank in the group's first operation; only a few take part in later ones
        owners: dict[str, dict[int, _Piece]] = {}
        for (name, shard, shape, dtype), ranks in sorted(gathered, key=lambda item: item[1][0]):
            piece = _Piece(name, shard, ranks, tuple(shape), getattr(torch, dtype))
            owners.setdefault(name, {}).setdefault(shard, piece)
        return [[owners[name][i] for i in sorted(owners[name])] for name in sorted(owners, key=self._table.position)]

    def _listed(self, weights: Sequence[LocalWeight]) -> list[tuple[str, int, Shape, str]]:
        return [
            (w.name, w.shard.rank, tuple(w.tensor.shape), str(self._exported_type(w.tensor)).removeprefix("torch."))
            for w in weights
        ]

    def _exported_type(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype

    @cached_property
    def _on_rank_0(self) -> list[_Bucket]:
        return [_Bucket(parameters, 0) for parameters in _buckets(self._parameters, self._bucket_bytes)]

    def _spread(self, limit: int) -> list[list[_Bucket]]:
        """Return rounds of buckets with at most one home on a rank.

        A bucket goes to the rank that has fewest bytes so far among those that hold its shards.
        """
        if limit in self._homes:
            return self._homes[limit]
        alike: dict[tuple[tuple[int, ...], ...], list[Parameter]] = {}
        for parameter in self._parameters:
            alike.setdefault(tuple(piece.ranks for piece in parameter), []).append(parameter)
        size = self._layout.world_size
        loads, of_rank = [0] * size, [list[_Bucket]() for _ in range(size)]
        for holders, parameters in sorted(alike.items(), key=lambda item: len(item[0]) * len(item[0][0])):
            replicas = min(map(len, holders))
            total = sum(map(_nbytes, parameters))
            share = -(-total // (len(holders) * replicas))
            for bucket in _buckets(parameters, max(1, min(limit // size, share))):
                candidates = ((ranks[i], i) for i in range(replicas) for ranks in holders)
                home, replica = min(candidates, key=lambda candidate: (loads[candidate[0]], candidate))
                loads[home] += sum(map(_nbytes, bucket))
                of_rank[home].append(_Bucket(bucket, home, replica))
        rounds = max(map(len, of_rank), default=0)
        self._homes[limit] = [[mine[i] for mine in of_rank if i < len(mine)] for i in range(rounds)]
        return self._homes[limit]

    def _described(self, parameter: Parameter) -> list[NamedShape]:
        """Return the names, shapes and types of the Hugging Face tensors that a parameter is made of."""
        rule, names = self._rule(parameter[0].name)
        shapes = rule.transform.hf_shapes(parameter[0].shape, len(parameter), self._architecture)
        return [NamedShape(n, s, parameter[0].dtype) for n, s in zip(names, shapes, strict=True)]

    def _merged(self, parameter: Parameter, shards: Mapping[_Piece, Tensor]) -> Iterator[tuple[str, Tensor]]:
        rule, names = self._rule(parameter[0].name)
        merged = rule.transform.merge([shards[piece] for piece in parameter], self._architecture)
        return zip(names, merged, strict=True)

    def _rule(self, name: str) -> tuple[Rule, list[str]]:
        """Return a parameter's rule and the names of its Hugging Face tensors."""
        if name not in self._rules:
            found = self._table.rule_of(name)
            assert found is not None, name
            rule, match = found
            self._rules[name] = rule, [fill(template, match) for template in rule.hf]
        return self._rules[name]

    def _collect(self, bucket: _Bucket) -> dict[_Piece, Tensor]:
        """Return all shards of a bucket on its home; other owners send theirs in one message each and get nothing."""
        by_owner, rank = bucket.by_owner(), self._layout.rank
        mine = {piece: self._own[piece.name].tensor.detach().to(piece.dtype) for piece in by_owner.pop(rank, [])}
        if rank != bucket.home:
            if mine:
                _exchange([dist.P2POp(dist.isend, _packed(mine), bucket.home)])
            return {}
        device = next(iter(self._own.values())).tensor.device
        messages = {
            owner: torch.empty(sum(piece.padded_bytes for piece in pieces), dtype=torch.uint8, device=device)
            for owner, pieces in by_owner.items()
        }
        _exchange([dist.P2POp(dist.irecv, message, owner) for owner, message in messages.items()])
        for owner, pieces in by_owner.items():
            mine.update(zip(pieces, _unpacked(messages[owner], pieces), strict=True))
        return mine


def export_hf(
    model_chunks: Sequence[nn.Module],
    hf_config: Mapping[str, object],
    layout: WeightLayout,
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face names and full tensors once, as `Export.full` does. Every rank must iterate to the end."""
    yield from Export(model_chunks, hf_config, layout, dtype=dtype, bucket_bytes=bucket_bytes).full()


def _nbytes(parameter: Parameter) -> int:
    return sum(piece.nbytes for piece in parameter)


def _buckets(plan: Sequence[Parameter], bucket_bytes: int) -> Iterator[list[Parameter]]:
    """Yield consecutive parameters of at most `bucket_bytes` together; a larger parameter has a bucket of its own."""
    bucket: list[Parameter] = []
    size = 0
    for parameter in plan:
        nbytes = _nbytes(parameter)
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes
    if bucket:
        yield bucket


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
