"""This module has what a simulated trainer trains: a table of logits, with its weights and checkpoints, on one rank."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron import durable
from fiberpo_megatron.interfaces import LocalShard, NamedShape, PendingSave, Policy
from fiberpo_megatron.types import (
    Coefficients,
    Gate,
    MicroBatch,
    OptimizerStep,
    RolloutBatch,
    RoutingMode,
    TokenScores,
    response_slices,
)

VOCABULARY = 16
"""Token 0 ends a response."""
TENSORS = ("high", "low")
"""Names of the two halves of the table, which are published in a round each."""


class OneRank:
    """It is the layout of a trainer with one process."""

    rank = data_rank = context_rank = 0
    world_size = data_size = context_size = expert_size = 1
    is_leader = is_last_stage = is_logger = True
    sequence_multiple = micro_batch_multiple = 1

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        return x

    def max_over_tokens(self, x: Tensor) -> Tensor:
        return x

    def gather_rollouts(self, share: RolloutBatch | None) -> RolloutBatch:
        assert share is not None
        return share

    def routes(self, rollouts: RolloutBatch, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the simulated model has no experts")

    def gather_json(self, value: Any, root_only: bool = False) -> list[Any]:
        return [json.loads(json.dumps(value))]

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        return [list(numbers)]

    def share_text(self, text: str | None) -> str:
        assert text is not None
        return text

    def wait_for_all(self, where: str, deadline_s: float) -> None:
        """Wait for no rank: there is one."""

    def agree(self, error: str | None, where: str, reraise: bool = True) -> None:
        if error is not None and reraise:
            raise RuntimeError(f"rank 0 failed while {where}: {error}")

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        """Wait for no rank: there is one."""


class NoExperts:
    """It is the routing of a dense model."""

    num_experts = 0
    layers = ()

    def clear(self) -> None:
        """There is nothing to forget."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the simulated model has no experts, but {name} was asked of its routing")


class TablePolicy:
    """p(next token | token) is the softmax of a row; an optimiser step is one of plain gradient ascent, and takes time.

    `work`: lets the time of a pass over some tokens pass.
    """

    def __init__(self, work: Callable[[], None], learning_rate: float = 0.5) -> None:
        self.layout = OneRank()
        self.routing: Any = NoExperts()
        self.table = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)
        self.learning_rate, self._work = learning_rate, work
        self.lineage: list[tuple[int, list[int]]] = []
        """(step, numbers of the trained prompts) of every step whose training is in the weights."""
        self.taken: tuple[int, list[int]] | None = None
        """The step that is trained on from the next optimiser step on."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        raise NotImplementedError("no term of a simulated run has a reference")
        yield

    def _scores(self, micro_batch: MicroBatch, temperature: float) -> Tensor:
        positions = micro_batch.response_positions
        return torch.log_softmax(self.table[micro_batch.tokens[positions]] / temperature, -1)

    def _log_probs(self, micro_batch: MicroBatch, temperature: float) -> Tensor:
        labels = micro_batch.labels[micro_batch.response_positions]
        return self._scores(micro_batch, temperature).gather(1, labels[:, None])[:, 0]

    def log_probs(
        self,
        micro_batches: Sequence[MicroBatch],
        temperature: float,
        *,
        routing: RoutingMode = "off",
        keep: bool = False,
    ) -> TokenScores:
        self._work()
        with torch.no_grad():
            rows = torch.cat([self._scores(m, temperature) for m in micro_batches])
            log_probs = torch.cat([self._log_probs(m, temperature) for m in micro_batches])
        return TokenScores(log_probs, -(rows.exp() * rows).sum(-1))

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        gate: Gate,
        temperature: float,
        *,
        log_probs: Tensor | None = None,
        single_pass: bool = False,
    ) -> OptimizerStep:
        self._work()
        if self.taken is not None:
            self.lineage.append(self.taken)
            self.taken = None
        outcomes: list[Coefficients] = []
        current = [self._log_probs(m, temperature) for m in micro_batches]
        if single_pass:
            outcomes = [gate(x.detach(), part) for x, part in zip(current, response_slices(micro_batches))]
        else:
            seen = torch.cat(current).detach() if log_probs is None else log_probs
            outcomes = [gate(seen, slice(0, len(seen)))]
        coefficients = torch.cat([o.gradient for o in outcomes]).float()
        (gradient,) = torch.autograd.grad((coefficients * torch.cat(current)).sum(), self.table)
        with torch.no_grad():
            self.table += self.learning_rate * gradient
        return OptimizerStep(gradient.norm().item(), self.learning_rate, tuple(outcomes), log_probs is None)

    @property
    def values(self) -> NDArray[np.float32]:
        """This is the table, [vocabulary, vocabulary]."""
        return self.table.detach().numpy()

    @property
    def weights(self) -> "Halves":
        return Halves(self.table.detach().clone())

    def release_memory(self) -> None:
        """The simulated engines have devices of their own."""

    def restore_memory(self) -> None:
        """The simulated engines have devices of their own."""

    def save(self, folder: str, state: Mapping[str, object]) -> None:
        with durable.replaced(Path(folder)) as file:
            file.write(self.state(state))

    def state(self, state: Mapping[str, object]) -> bytes:
        """Return all that a checkpoint holds."""
        return json.dumps([self.table.tolist(), self.lineage, state]).encode()

    def begin_save(self, folder: str, state: Mapping[str, object]) -> PendingSave:
        raise NotImplementedError("Saves writes checkpoints beside the training")

    def load(self, folder: str) -> dict[str, object]:
        table, lineage, state = json.loads(Path(folder).read_bytes())
        self.table = torch.tensor(table, requires_grad=True)
        self.lineage = [(step, numbers) for step, numbers in lineage]
        return dict(state)


class Halves:
    """These are the weights of a table, in two tensors."""

    def __init__(self, table: Tensor) -> None:
        self._parts = dict(zip(TENSORS, table.split(VOCABULARY // 2)))

    def full(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._parts.items()

    def local(self) -> Iterator[LocalShard]:
        for name, part in self._parts.items():
            yield LocalShard(name, part, tuple(part.shape), (0, 0))

    def rounds(self, limit: int) -> list[list[list[NamedShape]]]:
        return [[[NamedShape(name, tuple(part.shape), part.dtype)]] for name, part in self._parts.items()]

    def share(self, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        for item in self._parts.items():
            yield [item]


class Saves:
    """These are the checkpoints of a run, each a file in `folder`. One is written beside the training, `seconds` after
    it was begun on the clock `now`."""

    def __init__(self, folder: Path, seconds: float, now: Callable[[], float]) -> None:
        self._folder, self._seconds, self._now = folder, seconds, now
        self._begun: tuple[int, bytes, float] | None = None
        self._last = 0

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step_")) for path in self._folder.glob("step_*"))

    def resume(self, policy: TablePolicy) -> int:
        """Load the newest checkpoint; return its step, or 0."""
        found = self.steps()
        if not found:
            return 0
        policy.load(str(self._folder / f"step_{found[-1]}"))
        return found[-1]

    def save(
        self,
        policy: Policy,
        step: int,
        *,
        prompts: Mapping[str, object],
        measured: Mapping[str, float],
        terms: Mapping[str, object] | None = None,
    ) -> None:
        assert isinstance(policy, TablePolicy)
        self.complete(wait=True)
        self._begun = step, policy.state({}), self._now() + self._seconds

    def complete(self, wait: bool) -> int:
        if self._begun is not None and (wait or self._now() >= self._begun[2]):
            step, content, _ = self._begun
            self._folder.mkdir(exist_ok=True)
            with durable.replaced(self._folder / f"step_{step}") as file:
                file.write(content)
            self._begun, self._last = None, step
        return self._last
