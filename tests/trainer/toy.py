"""A policy of one table and an engine that samples from what was published: the loop's collaborators without
Megatron and SGLang. The real ones are in tests/distributed and tests/end_to_end."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fiberpo_megatron.types import (
    Coefficients,
    Completion,
    Gate,
    MicroBatch,
    OptimizerStep,
    Prompt,
    RolloutBatch,
    RolloutGroup,
    RoutingMode,
    TokenScores,
    WeightSpan,
    response_slices,
)

VOCABULARY = 12


class SingleLayout:
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

    def share_text(self, text: str | None) -> str:
        assert text is not None
        return text

    def agree(self, error: str | None, where: str, reraise: bool = True) -> None:
        if error is not None and reraise:
            raise RuntimeError(f"rank 0 failed while {where}: {error}")

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass


class TablePolicy:
    """p(next | previous) = softmax of a row; plain gradient ascent."""

    def __init__(self, learning_rate: float) -> None:
        self.layout = SingleLayout()
        self.table = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)
        self.learning_rate = learning_rate
        self.forwards = 0
        self.released = False

    def _scores(self, micro_batch: MicroBatch, temperature: float) -> Tensor:
        positions = micro_batch.response_positions
        return torch.log_softmax(self.table[micro_batch.tokens[positions]] / temperature, -1)

    def _log_probs(self, micro_batch: MicroBatch, temperature: float) -> Tensor:
        labels = micro_batch.labels[micro_batch.response_positions]
        return self._scores(micro_batch, temperature).gather(1, labels[:, None])[:, 0]

    def log_probs(
        self, micro_batches: Sequence[MicroBatch], temperature: float, *, routing: RoutingMode = "off"
    ) -> TokenScores:
        self.forwards += 1
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
        assert not self.released
        extra = log_probs is None and not single_pass
        parts = response_slices(micro_batches)
        outcomes: list[Coefficients] = []
        current = [self._log_probs(m, temperature) for m in micro_batches]
        if single_pass:
            outcomes = [gate(x.detach(), part) for x, part in zip(current, parts)]
        else:
            seen = torch.cat(current).detach() if log_probs is None else log_probs
            outcomes = [gate(seen, slice(0, len(seen)))]
        coefficients = torch.cat([o.gradient for o in outcomes]).float()
        (gradient,) = torch.autograd.grad((coefficients * torch.cat(current)).sum(), self.table)
        with torch.no_grad():
            self.table += self.learning_rate * gradient
        return OptimizerStep(gradient.norm().item(), self.learning_rate, tuple(outcomes), extra)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "table", self.table.detach().clone()

    def release_memory(self) -> None:
        self.released = True

    def restore_memory(self) -> None:
        self.released = False

    def save(self, folder: str, state: Mapping[str, object]) -> None:
        assert not self.released
        torch.save({"table": self.table.detach(), "state": dict(state)}, folder)

    def load(self, folder: str) -> dict[str, object]:
        saved = torch.load(folder)
        with torch.no_grad():
            self.table.copy_(saved["table"])
        return saved["state"]


class FakeEngine:
    """Sampler and publisher in one: samples from the table that was published last."""

    def __init__(self, seed: int, length: int = 3) -> None:
        self.table = torch.zeros(VOCABULARY, VOCABULARY)
        self.version = "none"
        self.length = length
        self.random = torch.Generator().manual_seed(seed)
        self.corrupt = 0.0
        self.missing: set[str] = set()
        """What of its memory it has given up, or holds without contents."""
        self.released: list[tuple[str, ...]] = []

    def release_memory(self, tags: Sequence[str]) -> None:
        self.released.append(tuple(tags))
        self.missing |= {f"{tag} memory" for tag in tags} | ({"weights"} & set(tags))

    def resume_memory(self, tags: Sequence[str]) -> None:
        self.missing -= {f"{tag} memory" for tag in tags}

    def publish(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        assert self.missing <= {"weights"}
        self.missing = set()
        for _, tensor in weights:
            self.table = tensor + self.corrupt * torch.eye(VOCABULARY)
        self.version = version

    def sample(
        self, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int], stop: Callable[[], bool]
    ) -> Iterator[tuple[int, list[Completion]]]:
        assert not self.missing
        for index, prompt in enumerate(prompts):
            yield index, [self._one(prompt[-1]) for _ in range(count)]

    def _one(self, token: int) -> Completion:
        tokens, log_probs = [], []
        for _ in range(self.length):
            row = torch.log_softmax(self.table[token], -1)
            token = int(torch.multinomial(row.exp(), 1, generator=self.random))
            tokens.append(token)
            log_probs.append(row[token].item())
        spans = (WeightSpan(self.version, 0, self.length),)
        return Completion(tuple(tokens), np.array(log_probs, np.float32), "stop", spans)

    def score(self, token_ids: Sequence[int]) -> list[list[float]]:
        assert not self.missing
        rows = torch.log_softmax(self.table[list(token_ids[:-1])], -1)
        return [rows.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()]


class NothingStored:
    """No rollouts on disk."""

    def load(self, step: int, prompts: Sequence[Prompt], weights: str) -> RolloutBatch | None:
        return None

    def save(self, step: int, prompts: Sequence[Prompt], weights: str, batch: RolloutBatch) -> None:
        pass

    def unfinished(
        self, step: int, prompts: Sequence[Prompt], weights: str, mine: Sequence[int]
    ) -> AbstractContextManager[MutableMapping[int, RolloutGroup]]:
        return nullcontext({})

    def saved(self, done: int) -> None:
        pass


class CountingPrompts:
    """Prompt p wants a response full of token p + 1 (mod the vocabulary)."""

    domains = ("counting", "other")

    def _prompt(self, index: int) -> Prompt:
        token = index % VOCABULARY
        return Prompt(index, token % 2, (token,), f"<{token}>", str((token + 1) % VOCABULARY))

    def prompts_at(self, seed: int, step: int, count: int) -> list[Prompt]:
        return [self._prompt(seed + step * count + i) for i in range(count)]

    def held_out(self, count: int) -> list[Prompt]:
        return [self._prompt(i) for i in range(count)]

    def observe(self, rollouts: RolloutBatch) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, object]:
        return {}
