"""This module brings the engines' routes of tokens from the leaders that got them to the ranks that route the tokens.

A leader has the routes of what it has generated. Which rank routes a token is known once the batch is packed. So each
rank names its tokens and layers to the leader of its replica, leaders ask each other for the tokens of their replicas,
and each rank gets its own tokens and layers: no rank but a leader holds another rank's.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.types import RolloutBatch

_LEADERS_TAG, _REPLICA_TAG = 7_003, 7_004


class Routes(NamedTuple):
    """Holds the routes of some tokens."""

    known: NDArray[np.bool_]
    """[m] whether an engine gave the routes of each token."""
    experts: NDArray[Any]
    """[sum of `known`, layers, top_k] uint8 or int16."""


def held_routes(rollouts: RolloutBatch, rows: NDArray[np.int64]) -> Routes:
    """Return what this process holds of the tokens with these numbers (`RolloutBatch.routing_rows`), all layers."""
    held = rollouts.held_rows  # ascending
    at = np.searchsorted(held, rows).clip(max=max(len(held) - 1, 0))
    known = held[at] == rows if len(held) else np.zeros(len(rows), np.bool_)
    return Routes(known, rollouts.routed_experts[at[known]])


def collect(
    rollouts: RolloutBatch, tokens: Tensor, layers: Sequence[int], *, replica: Any, leader: int, leaders: Any | None
) -> Routes:
    """Return the routes of the flat tokens [m] in the given layers. Every rank calls it.

    Args:
        rollouts: the step's batch, in which leaders hold routes.
        replica: the Gloo group of this data-parallel replica.
        leader: the global rank of its leader.
        leaders: the Gloo group of all leaders, on leaders; None on other ranks.
    """
    rows = rollouts.routing_rows[tokens.numpy()].astype(np.int64)
    root = dist.get_group_rank(replica, leader)
    asked = exchange.gather_bytes(_bytes(np.concatenate([[len(layers)], layers, rows]).astype(np.int64)), replica, root)
    if leaders is None:
        return _unpack(_receive(replica, root, _REPLICA_TAG), len(rows))
    requests = [_request(message) for message in asked]
    wanted = np.unique(np.concatenate([of for _, of in requests]))
    found = _from_leaders(rollouts, wanted, leaders)
    place = np.cumsum(found.known) - 1
    mine = Routes(np.zeros(0, np.bool_), found.experts[:0])
    for rank, (their_layers, their_rows) in enumerate(requests):
        at = np.searchsorted(wanted, their_rows)
        if len(their_layers) and their_layers.max() < found.experts.shape[1]:
            known = found.known[at]
            answer = Routes(known, found.experts[place[at[known]]][:, their_layers])
        else:  # the engine has fewer layers than the model
            answer = Routes(np.zeros(len(at), np.bool_), np.zeros((0, len(their_layers), 0), found.experts.dtype))
        if rank == root:
            mine = answer
        else:
            _send(_pack(answer), replica, rank, _REPLICA_TAG)
    return mine


def _from_leaders(rollouts: RolloutBatch, wanted: NDArray[np.int64], group: Any) -> Routes:
    """Return the routes of the tokens that a replica needs, from all leaders.

    Those of another shape than the first leader's are left out: they are of another model, and the ranks that replay
    them find that they are missing.
    """
    held = rollouts.routed_experts
    about = exchange.all_gather_json([_intervals(rollouts.held_rows), held.shape[1:], held.dtype.str], group)
    given = [(tuple(shape), np.dtype(kind)) for intervals, shape, kind in about if intervals]
    shape = given[0][0] if given else (0, 0)
    dtype = np.result_type(*(kind for _, kind in given)) if given else np.dtype(np.uint8)
    asks = [wanted[_inside(wanted, intervals if tuple(its) == shape else [])] for intervals, its, _ in about]
    requests = dict(_exchanged(lambda peer: _bytes(asks[peer]), group))
    known = np.zeros(len(wanted), np.bool_)
    experts = np.zeros((len(wanted), *shape), dtype)
    for peer, message in _exchanged(lambda peer: _pack(held_routes(rollouts, _numbers(requests[peer]))), group):
        answer = _unpack(message, len(asks[peer]))
        at = np.searchsorted(wanted, asks[peer][answer.known])
        known[at] = True
        if len(at):
            experts[at] = answer.experts
    return Routes(known, experts[known])


def _exchanged(message: Callable[[int], Tensor], group: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield each peer of a group, this rank included, with what it has sent here; one message is made at a time."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    yield rank, message(rank)
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        data = message(to)
        length = torch.tensor([len(data)])
        sending = [dist.isend(length, group=group, group_dst=to, tag=_LEADERS_TAG)]
        if len(data):
            sending.append(dist.isend(data, group=group, group_dst=to, tag=_LEADERS_TAG))
        yield source, _receive(group, source, _LEADERS_TAG)
        for one in sending:
            assert one is not None, "this rank belongs to the group"
            one.wait()


def _send(data: Tensor, group: Any, to: int, tag: int) -> None:
    dist.send(torch.tensor([len(data)]), group=group, group_dst=to, tag=tag)
    if len(data):
        dist.send(data, group=group, group_dst=to, tag=tag)


def _receive(group: Any, source: int, tag: int) -> Tensor:
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, group=group, group_src=source, tag=tag)
    data = torch.empty(int(length), dtype=torch.uint8)
    if len(data):
        dist.recv(data, group=group, group_src=source, tag=tag)
    return data


def _bytes(numbers: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).copy())


def _numbers(message: Tensor) -> NDArray[np.int64]:
    found: NDArray[np.int64] = message.numpy().view(np.int64)
    return found


def _request(message: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    numbers = _numbers(message.clone())
    layers = int(numbers[0])
    return numbers[1 : 1 + layers], numbers[1 + layers :]


def _pack(routes: Routes) -> Tensor:
    """Return a header with shape and type, whether each token is known, and the experts, as bytes."""
    header = json.dumps([routes.experts.dtype.str, routes.experts.shape]).ljust(64).encode()
    return torch.cat([_bytes(np.frombuffer(header, np.uint8)), _bytes(routes.known), _bytes(routes.experts)])


def _unpack(message: Tensor, tokens: int) -> Routes:
    data = message.numpy()
    dtype, shape = json.loads(data[:64].tobytes())
    known = data[64 : 64 + tokens].view(np.bool_)
    return Routes(known, data[64 + tokens :].view(dtype).reshape(shape))


def _intervals(rows: NDArray[np.int64]) -> list[list[int]]:
    """Return the first and last number of each run of ascending numbers; a gap of one number does not end a run."""
    if not len(rows):
        return []
    ends = np.flatnonzero(np.diff(rows) > 2)
    firsts, lasts = [0, *(ends + 1).tolist()], [*ends.tolist(), len(rows) - 1]
    return [[int(rows[first]), int(rows[last])] for first, last in zip(firsts, lasts, strict=True)]


def _inside(rows: NDArray[np.int64], intervals: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    found = np.zeros(len(rows), np.bool_)
    for first, last in intervals:
        found |= (rows >= first) & (rows <= last)
    return found
