"""This module records every collective of a process, checks its tensors' device, and compares the records of ranks.

    with recorded_collectives() as record, strict_devices(record):
        ...
    problems = disagreements([record.calls of every rank])

Groups that the code asks NCCL for are made with gloo, and remembered as NCCL's: a tensor of the host in one of them, or
one of the device in a group of gloo, raises DeviceError. Records of all ranks are compared group by group: which
operations came in which order, with which shapes, types, roots and split sizes, and whether what one rank sends is what
the other one receives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from tools.strict_devices import DEVICE, DeviceError, on_device, place

Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""(shape, type) of each tensor of an argument."""
_PEERS = {"send": "dst", "recv_": "src"}
_ONE_SIDED = {"gather_": "output_tensors", "scatter_": "input_tensors"}
"""Arguments that only the root gives."""


@dataclass(frozen=True)
class Call:
    """Describes one operation on one rank."""

    name: str
    group: str
    """Torch's name of the group, the same on all of its ranks."""
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    backend: str
    """What the code asked for: nccl or gloo."""
    tensors: dict[str, Shapes]
    """By the name of the argument."""
    numbers: dict[str, Any]
    """Roots, peers, tags and split sizes, by the name of the argument; ranks are those inside the group."""
    place: str
    """Where in the source it was called."""

    def __str__(self) -> str:
        shapes = {name: [f"{list(shape)} {kind}" for shape, kind in found] for name, found in self.tensors.items()}
        return f"{self.name} of {shapes} {self.numbers or ''} in {self.place}"


@dataclass
class Collectives:
    """Runs and records the operations of torch.distributed on this rank."""

    calls: list[Call] = field(default_factory=list)
    backends: dict[str, str] = field(default_factory=dict)
    """What the code asked for, by name of the group."""
    check_devices: bool = True

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation of the namespace c10d after a check, and record it."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        group = dist.ProcessGroup.unbox(given["process_group"])
        call = self._describe(func.overloadpacket.__name__, group, given)
        if self.check_devices and call.name not in ("barrier", "monitored_barrier_"):
            self._check(call, given)
        self.calls.append(call)
        return self.perform(func, args, kwargs, call, given)

    def perform(self, func: Any, args: Any, kwargs: Any, call: Call, given: dict[str, Any]) -> Any:
        """Run the operation."""
        return func(*args, **kwargs)

    def _describe(self, name: str, group: Any, given: dict[str, Any]) -> Call:
        found = {key: [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)] for key, value in given.items()}
        tensors = {key: tuple((tuple(x.shape), str(x.dtype)[6:]) for x in values) for key, values in found.items()}
        if name in ("barrier", "monitored_barrier_"):
            tensors = {}
        numbers = {
            key: value
            for key, value in given.items()
            if key in ("root_rank", "dst", "src", "tag", "input_split_sizes", "output_split_sizes")
        }
        ranks = tuple(dist.get_process_group_ranks(group))
        backend = self.backends.get(group.group_name, "gloo")
        return Call(name, group.group_name, ranks, backend, {k: v for k, v in tensors.items() if v}, numbers, place())

    def _check(self, call: Call, given: dict[str, Any]) -> None:
        wanted = call.backend == "nccl"
        for tensor in tree_leaves(list(given.values())):
            if isinstance(tensor, torch.Tensor) and on_device(tensor) != wanted:
                raise DeviceError(
                    f"a tensor of the {'host' if wanted else 'device'} in a group of {call.backend} (ranks "
                    f"{list(call.ranks)}): {call}"
                )


@contextmanager
def recorded_collectives(record: Collectives | None = None, backend: str = "gloo") -> Iterator[Collectives]:
    """Make the process groups of this block with `backend`, and remember which one the code asked for."""
    record = record or Collectives()
    init, new_group = dist.init_process_group, dist.new_group
    default = ["gloo"]

    def init_process_group(wanted: str | None = None, **options: Any) -> None:
        default[0] = wanted or "gloo"
        init(backend, **options)
        record.backends[dist.group.WORLD.group_name] = default[0]

    def make_group(ranks: Any = None, timeout: Any = None, backend_: Any = None, **options: Any) -> Any:
        wanted = options.pop("backend", backend_) or default[0]
        options.pop("pg_options", None)  # those of NCCL
        group = new_group(ranks, timeout, backend, **options)
        if isinstance(group, dist.ProcessGroup):
            record.backends[group.group_name] = str(wanted)
        return group

    def object_device(group: Any = None) -> torch.device:
        asked = record.backends.get((group or dist.group.WORLD).group_name)
        return DEVICE if asked == "nccl" else torch.device("cpu")

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist.distributed_c10d, "_get_object_coll_device", object_device))
        stack.enter_context(mock.patch.object(dist, "init_process_group", init_process_group))
        stack.enter_context(mock.patch.object(dist, "new_group", make_group))
        yield record


def disagreements(ranks: dict[int, Sequence[Call]], complete: bool = True) -> list[str]:
    """Return what ranks disagree about, as text; empty when all fit.

    `ranks` holds the calls of each rank, by its global number. With `complete` every rank of every group is among them;
    without, only the given ranks are compared, and not how many rows they exchange in an all-to-all.
    """
    by_group: dict[str, dict[int, list[Call]]] = defaultdict(dict)
    for rank, calls in ranks.items():
        for call in calls:
            by_group[call.group].setdefault(rank, []).append(call)
    problems = []
    for group, found in by_group.items():
        members = next(iter(found.values()))[0].ranks
        if complete and any(rank not in found for rank in members) and _has_collective(found):
            problems.append(f"group {group} of ranks {members}: only {sorted(found)} called anything")
        collective = {rank: [call for call in calls if call.name not in _PEERS] for rank, calls in found.items()}
        problems += _order(group, collective, complete)
        problems += _pairs(group, members, found)
    return problems


def _has_collective(found: dict[int, list[Call]]) -> bool:
    return any(call.name not in _PEERS for calls in found.values() for call in calls)


def _order(group: str, found: dict[int, list[Call]], complete: bool) -> list[str]:
    """Compare the collectives of one group's ranks, one by one."""
    first, *others = sorted(found)
    for rank in others:
        mine, theirs = found[first], found[rank]
        for at, (a, b) in enumerate(zip(mine, theirs)):
            if _face(a, first) != _face(b, rank) or (complete and not _splits_fit(a, b, first, rank)):
                return [f"group {group}, call {at}: rank {first} has {a}, rank {rank} has {b}"]
        if len(mine) != len(theirs):
            longer = mine if len(mine) > len(theirs) else theirs
            return [
                f"group {group}: rank {first} makes {len(mine)} calls and rank {rank} {len(theirs)}; the first that is "
                f"missing is {longer[min(len(mine), len(theirs))]}"
            ]
    return []


def _face(call: Call, rank: int) -> tuple[Any, ...]:
    """Return what must be equal on all ranks of a collective."""
    tensors = {key: shapes for key, shapes in call.tensors.items() if key != _ONE_SIDED.get(call.name)}
    if call.name == "alltoall_base_":
        # ranks may send and receive different numbers of rows
        return call.name, tuple((shape[1:], kind) for shapes in tensors.values() for shape, kind in shapes)
    if call.name == "alltoall_":
        return call.name, tuple(kind for shapes in tensors.values() for _, kind in shapes)
    return call.name, tuple(sorted(tensors.items())), call.numbers.get("root_rank")


def _splits_fit(a: Call, b: Call, rank: int, other: int) -> bool:
    """Return whether the rows that two ranks exchange in an all-to-all are as many on either side."""
    if a.name != "alltoall_base_":
        return True
    at, other_at = a.ranks.index(rank), a.ranks.index(other)
    return _rows(a, "input", other_at) == _rows(b, "output", at) and _rows(b, "input", at) == _rows(
        a, "output", other_at
    )


def _rows(call: Call, side: str, peer: int) -> int:
    splits = call.numbers[f"{side}_split_sizes"]
    ((shape, _),) = call.tensors[side]
    return int(splits[peer]) if splits else shape[0] // len(call.ranks)


def _pairs(group: str, members: tuple[int, ...], found: dict[int, list[Call]]) -> list[str]:
    """Compare what each rank sends with what its peer receives."""
    problems = []
    for source, calls in found.items():
        for target in found.keys() - {source}:
            sent = [c for c in calls if c.name == "send" and members[c.numbers["dst"]] == target]
            received = [c for c in found[target] if c.name == "recv_" and members[c.numbers["src"]] == source]
            shapes = [[(c.tensors["tensors"], c.numbers["tag"]) for c in messages] for messages in (sent, received)]
            if shapes[0] != shapes[1]:
                at = next((i for i, (a, b) in enumerate(zip(*shapes)) if a != b), min(map(len, shapes)))
                texts = [str(messages[at]) if at < len(messages) else "nothing" for messages in (sent, received)]
                problems.append(
                    f"group {group}, message {at} from rank {source} to rank {target}: sent is {texts[0]}, awaited is "
                    f"{texts[1]}"
                )
    return problems
