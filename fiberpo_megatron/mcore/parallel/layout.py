"""This module knows where a process is in the layout; only it reads (and initialises) megatron.core.parallel_state."""

import datetime
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import count
from math import lcm
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from fiberpo_megatron.config.schema import RunConfig
from fiberpo_megatron.mcore.parallel import exchange, routes
from fiberpo_megatron.mcore.parallel.checks import check_layout
from fiberpo_megatron.mcore.parallel.patience import Patience
from fiberpo_megatron.mcore.platform import activate
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.rendezvous import ranks_store
from fiberpo_megatron.types import RolloutBatch, join_batches

__all__ = ["ParallelLayout", "check_layout", "launched_world_size", "start_layout", "stop_layout"]

FP8_ROW_MULTIPLE = 32
"""Tokens: Transformer Engine's FP8 products want rows in multiples of 16, MXFP8 of 32."""
LAZY_FROM_RANKS = 128
"""With so many ranks, Gloo connects two of them when they first speak to each other. Before, it connects all pairs of a
group at once, and every rank reads an entry of 154 + 8 x ranks bytes of every other from the rendezvous store."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_starts = count()
"""Number of layouts in this process so far; the same on every rank."""


def launched_world_size() -> int:
    """Return the number of processes that the launcher (torchrun, srun) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _waiting(method: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Add the time of a method to the layout's `waited_s`; one that another one calls is counted once."""

    @wraps(method)
    def timed(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        layout: Any = arguments[0]
        began = time.perf_counter()
        layout._waits += 1
        try:
            return method(*arguments, **named)
        finally:
            layout._waits -= 1
            if not layout._waits:
                layout.waited_s += time.perf_counter() - began

    return timed


@dataclass(frozen=True)
class Axes:
    """Holds one process's ranks along every dimension."""

    tensor: int
    context: int
    data: int
    pipeline: int


class ParallelLayout:
    """Implements `types.Layout` on Megatron's process groups."""

    def __init__(self, parallel: ParallelConfig, timeout: datetime.timedelta) -> None:
        platform = activate()
        self._timeout = timeout
        self.parallel = parallel
        self.device = platform.device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        self.pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.pipeline_size = parallel_state.get_pipeline_model_parallel_world_size()
        self.context_rank = parallel_state.get_context_parallel_rank()
        self.context_size = parallel_state.get_context_parallel_world_size()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.expert_rank = parallel_state.get_expert_model_parallel_rank()
        self.expert_size = parallel_state.get_expert_model_parallel_world_size()
        self.is_leader = self.tensor_rank == 0 and self.context_rank == 0 and self.pipeline_rank == 0
        self.is_last_stage = self.pipeline_rank == self.pipeline_size - 1
        self.is_logger = self.is_last_stage and self.tensor_rank == self.context_rank == self.data_rank == 0
        self.sequence_multiple = _sequence_multiple(self.tensor_size, self.context_size)
        self.micro_batch_multiple = self.pipeline_size if parallel.virtual_pipeline > 1 else 1
        self.waited_s = 0.0
        """Seconds for which this rank has waited for others in the methods of this object. Waiting inside a pass of the
        model is not in it: Megatron's own collectives, and those on a GPU, which the host does not wait for."""
        self._waits = 0
        self._patience = Patience(self.rank, self.world_size)
        self._writers: dict[tuple[tuple[int, ...], bool], Any] = {}
        self._make_groups(platform.backend)

    def _make_groups(self, backend: str) -> None:
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.token_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if backend == "gloo":
            self.host_group, self._host_token_group = dist.group.WORLD, self.token_group
        else:
            self.host_group = dist.new_group(backend="gloo", timeout=self._timeout)
            self._host_token_group = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
        axes = [Axes(*row) for row in self._everyones_axes()]
        last = self.pipeline_size - 1
        self._logger = next(
            r for r, at in enumerate(axes) if at.pipeline == last and at.tensor == at.context == at.data == 0
        )
        leaders = [r for r, at in enumerate(axes) if at.tensor == at.context == at.pipeline == 0]
        self._leaders = sorted(leaders, key=lambda rank: axes[rank].data)
        self._leader_group = dist.new_group(self._leaders, backend="gloo", timeout=self._timeout)
        replicas: list[list[int]] = [[] for _ in range(self.data_size)]
        for rank, at in enumerate(axes):
            replicas[at.data].append(rank)
        for data, members in enumerate(replicas):
            group = dist.new_group(members, backend="gloo", timeout=self._timeout)
            if data == self.data_rank:
                self._replica_group = group

    def _everyones_axes(self) -> list[list[int]]:
        mine = torch.tensor([self.tensor_rank, self.context_rank, self.data_rank, self.pipeline_rank])
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.host_group)
        return [row.tolist() for row in everyone]

    def writers(self, writes: bool, background: bool) -> Any:
        """Return the Gloo group of the ranks that pass `writes`, for the calling thread or for one in the background.

        Every rank calls it, at the same place; it is None on ranks that pass False. A group is made once.
        """
        flags = torch.zeros(self.world_size, dtype=torch.uint8)
        flags[self.rank] = writes
        dist.all_reduce(flags, group=self.host_group)
        members = tuple(flags.nonzero().flatten().tolist())
        key = members, background
        if key not in self._writers:
            self._writers[key] = dist.new_group(members, backend="gloo", timeout=self._timeout)
        return self._writers[key] if writes else None

    def align_rows(self, multiple: int) -> None:
        """Make every rank's share of a sequence a multiple of so many tokens."""
        self.sequence_multiple = lcm(self.sequence_multiple, multiple * self.tensor_size * self.context_size)

    @property
    def chunks(self) -> int:
        """Return the number of model chunks of this process (virtual pipeline stages)."""
        return self.parallel.virtual_pipeline

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """Return the sum over the data x context parallel ranks; the argument is left as it is."""
        return self._reduce_over_tokens(x, dist.ReduceOp.SUM)

    def max_over_tokens(self, x: Tensor) -> Tensor:
        """Return the maximum over the data x context parallel ranks; the argument is left as it is."""
        return self._reduce_over_tokens(x, dist.ReduceOp.MAX)

    @_waiting
    def _reduce_over_tokens(self, x: Tensor, op: Any) -> Tensor:
        out = x.detach().clone()
        if self.data_size * self.context_size > 1:
            dist.all_reduce(out, op=op, group=self.token_group if x.is_cuda else self._host_token_group)
        return out

    @_waiting
    def gather_rollouts(self, share: RolloutBatch | None) -> RolloutBatch:
        """Join the leaders' shares in data-parallel order, groups renumbered; every rank calls it.

        No trajectory group may span two shares. The engines' routes stay with the leader that brought them: `routes`
        brings them to the ranks that route the tokens.
        """
        message: Tensor | None = None
        before = 0
        if self.is_leader:
            assert share is not None, "the leader of a data-parallel replica brings its share"
            parts = exchange.all_gather_bytes(exchange.encode(share.without_held()), self._leader_group)
            shares = [exchange.decode(part) for part in parts]
            message = exchange.encode(join_batches(shares))
            before = sum(len(earlier.tokens) for earlier in shares[: dist.get_rank(self._leader_group)])
        leader = self._leaders[self.data_rank]
        joined = exchange.decode(exchange.broadcast_bytes(message, leader, self._replica_group))
        if share is None or not len(share.held_rows):
            return joined
        first = int(joined.routing_rows[before] - share.routing_rows[0])
        return replace(joined, held_rows=share.held_rows + first, routed_experts=share.routed_experts)

    @_waiting
    def routes(self, rollouts: RolloutBatch, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what the engines said about the flat tokens [m] that this rank routes, in its layers.

        These are bool [m], whether a token's routes are known, and uint8 or int16 [known tokens, layers, top_k], on the
        host. Every rank calls it; each gets its own tokens and layers alone.
        """
        leaders = self._leader_group if self.is_leader else None
        leader = self._leaders[self.data_rank]
        found = routes.collect(rollouts, tokens, layers, replica=self._replica_group, leader=leader, leaders=leaders)
        return torch.from_numpy(found.known), torch.from_numpy(np.ascontiguousarray(found.experts))

    @_waiting
    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return every rank's float32 numbers, in rank order, on the rank that logs, and an empty list on the others.

        Every rank calls it with equally many: four bytes each, in one message of every rank.
        """
        row = torch.tensor(list(numbers), dtype=torch.float32).view(torch.uint8)
        rows = exchange.gather_bytes(row, self.host_group, root=self._logger)
        return [part.contiguous().view(torch.float32).tolist() for part in rows]

    @_waiting
    def gather_json(self, value: Any, root_only: bool = False) -> list[Any]:
        """Return every rank's JSON value, in rank order; with `root_only` an empty list on ranks other than 0. Every
        rank calls it."""
        gather = exchange.gather_json if root_only else exchange.all_gather_json
        return gather(value, self.host_group)

    @_waiting
    def share_text(self, text: str | None) -> str:
        """Return rank 0's text on every rank; the others pass None."""
        message = exchange.text_to_bytes(text or "") if self.rank == 0 else None
        return exchange.bytes_to_text(exchange.broadcast_bytes(message, 0, self.host_group))

    @_waiting
    def agree(
        self, error: str | None, where: str, reraise: bool = True, raises: type[Exception] = RuntimeError
    ) -> None:
        """Raise the first failing rank's error on all ranks; every rank calls this with its error or None.

        If any rank passed an error, those with `reraise` raise one `raises` that names the first failing rank, `where`
        and the error.
        """
        if not self.any_rank(error is not None):
            return
        texts = exchange.all_gather_bytes(exchange.text_to_bytes(error or ""), self.host_group)
        errors = [(rank, exchange.bytes_to_text(text)) for rank, text in enumerate(texts)]
        failures = [f"rank {rank}: {text}" for rank, text in errors if text]
        more = f" (and on {len(failures) - 1} other ranks)" if len(failures) > 1 else ""
        if reraise:
            raise raises(f"{where} failed on {failures[0] if failures else 'an unnamed rank'}{more}")

    @_waiting
    def wait_for_all(self, where: str, deadline_s: float) -> None:
        """Return when every rank has called this; see `patience.Patience.wait`."""
        self._patience.wait(where, deadline_s)

    @_waiting
    def any_rank(self, flag: bool) -> bool:
        """Return whether any rank passed True; every rank calls this and gets the same answer."""
        return exchange.any_true(flag, self.host_group)

    @_waiting
    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.host_group)


def _sequence_multiple(tensor: int, context: int) -> int:
    """Return the multiple at which a sequence splits into 2 x context zigzag chunks and a local row over the tensor
    ranks."""
    return lcm(2 * context if context > 1 else 1, tensor * context)


def start_layout(hf_config: Mapping[str, Any], parallel: ParallelConfig, run: RunConfig) -> ParallelLayout:
    """Check the layout, join the other processes of the launcher and build the process groups.

    This reads the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without one, the
    world is one process. Raises ValueError when the layout does not divide.
    """
    check_layout(hf_config, parallel, launched_world_size())
    platform = activate()
    timeout = datetime.timedelta(seconds=run.distributed_timeout_s)
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    if platform.name == "cpu":
        torch.set_num_threads(run.threads_per_rank)
    if launched_world_size() >= LAZY_FROM_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # torch reads it when the first group is made
    # a prefix for each start: gloo would take the addresses that an earlier one left in the store for living ranks
    prefix = f"training {next(_starts)}"
    store = dist.PrefixStore(prefix, ranks_store(timeout)) if "RANK" in os.environ else dist.HashStore()
    rank, size = int(os.environ.get("RANK", "0")), launched_world_size()
    dist.init_process_group(platform.backend, store=store, rank=rank, world_size=size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=run.distributed_timeout_s / 60,
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(run.seed)
    return ParallelLayout(parallel, timeout)


def stop_layout() -> None:
    """Leave the process groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
