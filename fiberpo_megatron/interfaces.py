"""This module holds the protocols by which the parts of a run know each other, each once.

The training loop depends on these and on nothing behind them; the fakes of the tests are checked against them by mypy.
B token sequences, N tokens of all sequences, n local response tokens, as in `types`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fiberpo_megatron.environments import Message
from fiberpo_megatron.evaluation.settings import EvaluationSet
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import (
    Completion,
    Gate,
    MicroBatch,
    OptimizerStep,
    Prompt,
    RolloutBatch,
    RolloutGroup,
    RoutingMode,
    TokenScores,
)


class Layout(Protocol):
    """This is where a process stands in the parallel layout, and how its ranks agree. The trainer asks nothing else."""

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    expert_size: int
    is_leader: bool
    """Whether it is the first rank of its data-parallel replica: it generates that replica's share of the prompts."""
    is_last_stage: bool
    """Whether it holds the log-probs."""
    is_logger: bool
    """Whether it is the one rank that writes metrics: last pipeline stage, first in every other dimension."""
    sequence_multiple: int
    """Every packed sequence is padded to a multiple of this."""
    micro_batch_multiple: int
    """The number of micro-batches of a step should be a multiple of this (interleaved pipeline). Missing ones are made
    of padding."""

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """Sum a float64 tensor over the data x context parallel ranks."""
        ...

    def max_over_tokens(self, x: Tensor) -> Tensor:
        """Return the maximum of a float64 tensor over the data x context parallel ranks."""
        ...

    def gather_rollouts(self, share: RolloutBatch | None) -> RolloutBatch:
        """Join the leaders' shares in data-parallel order. Every rank calls it, the leaders with their share. Leaders
        keep the engines' routes of their share."""
        ...

    def routes(self, rollouts: RolloutBatch, tokens: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return whether the engines' routes of each flat token [m] are known (bool [m]), and those that are
        ([known tokens, layers, top_k]), on the host. Every rank calls it, with the tokens and layers that it routes."""
        ...

    def gather_json(self, value: Any, root_only: bool = False) -> list[Any]:
        """Return every rank's JSON value, in rank order; with `root_only` an empty list on ranks other than 0. Every
        rank calls it."""
        ...

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return every rank's float32 numbers, in rank order, on the rank that logs; an empty list on the others. Every
        rank calls it with equally many."""
        ...

    def share_text(self, text: str | None) -> str:
        """Return rank 0's text on every rank; the others pass None."""
        ...

    def agree(self, error: str | None, where: str, reraise: bool = True) -> None:
        """Let all ranks fail together. Every rank calls it with its error or None. If any rank passed one, those with
        `reraise` raise one RuntimeError that names the first failing rank, `where` and the error."""
        ...

    def wait_for_all(self, where: str, deadline_s: float) -> None:
        """Return when every rank has called this, outside of any collective. Raises TimeoutError after `deadline_s`
        (s), which names `where` and the ranks that have not come."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Return whether any rank passed True. Every rank calls it and gets the same answer."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...


class Routing(Protocol):
    """It holds the experts of the tokens that this rank routes in a step, as the policy recorded them and as the engine
    returned them."""

    num_experts: int
    """Experts of a MoE layer; 0 in a dense model."""

    @property
    def layers(self) -> Sequence[int]:
        """These are the global numbers, from 0, of this rank's MoE layers."""
        ...

    def clear(self) -> None:
        """Forget all routes."""
        ...

    def tokens(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return int64 [m], the flat tokens that this rank routes in these micro-batches."""
        ...

    def fill(self, tokens: Tensor, experts: Tensor, *, replay: bool) -> None:
        """Take the engine's experts [m, this rank's MoE layers, top_k] of the flat tokens [m]; with `replay` the passes
        replay them in place of the recorded ones."""
        ...

    def expert_counts(self, micro_batches: Sequence[MicroBatch], *, engine: bool = False) -> Tensor:
        """Return float32 [n, experts]: the routed (layer, slot) pairs of the position that predicts each token, as
        recorded or, with `engine`, as the engine returned them. Every rank calls it."""
        ...

    def chosen(self, tokens: Tensor, *, engine: bool = False) -> Mapping[int, Tensor]:
        """Return, per MoE layer of which this rank has routes, int64 [m, top_k] on the host: the experts of the flat
        tokens [m], -1 for those that this rank has not seen. It calls no other rank."""
        ...

    def agreement(self, micro_batches: Sequence[MicroBatch], bins: Tensor, count: int) -> Tensor:
        """Return float64 [layers, count, 2] over all ranks: tokens whose recorded expert set equals the engine's, and
        tokens compared, for each of `count` sets of tokens; `bins` [N] says in which a flat token is."""
        ...


class PendingSave(Protocol):
    """It is a checkpoint that is being written. Every rank calls the methods."""

    def written(self) -> bool:
        """Return whether `finish` would not wait; the same on every rank."""
        ...

    def finish(self) -> None:
        """Complete the checkpoint. Raises on every rank, with the cause, when a file could not be written."""
        ...


class Passes(Protocol):
    """It computes log-probs and takes optimiser steps: the policy as the training loop needs it."""

    @property
    def routing(self) -> Routing: ...

    @property
    def layout(self) -> Layout: ...

    def log_probs(
        self,
        micro_batches: Sequence[MicroBatch],
        temperature: float,
        *,
        routing: RoutingMode = "off",
        keep: bool = False,
    ) -> TokenScores | None:
        """Run a forward pass without gradient; return scores on the last pipeline stage, None elsewhere.

        `routing` says whether the experts of every token are recorded, or taken from the record. With `keep` the next
        pass is that of an optimiser step over these micro-batches with these weights, which may go on from here.
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Let `log_probs` compute with the weights of the reference inside the block. Every rank enters it."""
        ...

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        gate: Gate,
        temperature: float,
        *,
        log_probs: Tensor | None = None,
        single_pass: bool = False,
    ) -> OptimizerStep:
        """Take one optimiser step that maximises the gate's objective.

        `log_probs` are this rank's current ones when they are already known (the first step on a fresh batch; empty
        on ranks that are not on the last stage). The pass without gradient is then skipped. It is also skipped with
        `single_pass`, where the gate sees one micro-batch at a time. Raises FloatingPointError before the weights move
        when a gradient is not finite.
        """
        ...


@dataclass(frozen=True)
class LocalShard:
    """This is a rank's part of one tensor of the Hugging Face folder."""

    name: str
    """Hugging Face name of the full tensor."""
    tensor: Tensor
    """The values that this rank holds, without a copy where the layouts agree."""
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    offset: tuple[int, ...]
    """Where the values begin in the full tensor, by dimension."""


class NamedShape(NamedTuple):
    """It describes one tensor of the Hugging Face folder."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """This source gives the policy's current weights under their Hugging Face names."""

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and full tensors, one at a time. Gathering a tensor is collective: every rank iterates to the
        end. Rank 0 gets the tensors, other ranks get empty ones."""
        ...

    def local(self) -> Iterator[LocalShard]:
        """Yield the parts that this rank holds, without communication."""
        ...

    def rounds(self, limit: int) -> Sequence[Sequence[Sequence[NamedShape]]]:
        """List what `share` yields: by round and rank, the names, shapes and types of full tensors, in order.

        Each tensor falls to one rank; the bytes are spread over the ranks, and a round has about `limit` bytes, all
        ranks together. Every rank makes the first call. For one `limit` the list stays the same for a run."""
        ...

    def share(self, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the names and full tensors of each round that this rank has; a round may have none.

        Ranks that hold parts of one tensor exchange them: every rank iterates to the end, a round at a time."""
        ...


class WeightExport(Protocol):
    """It gives the weights to whoever publishes or saves them."""

    @property
    def weights(self) -> WeightSource: ...


class Checkpointing(Protocol):
    """This part saves and restores everything that training changes, and can release the device's memory."""

    def release_memory(self) -> None:
        """Leave the device's memory, except for the parameters, to somebody else. No step and no save is possible
        until it is restored."""
        ...

    def restore_memory(self) -> None:
        """Undo `release_memory` without a trace in the results."""
        ...

    def save(self, folder: str, state: Mapping[str, object]) -> None:
        """Write a checkpoint with the caller's JSON values `state`. Every rank calls it."""
        ...

    def begin_save(self, folder: str, state: Mapping[str, object]) -> PendingSave:
        """Write a checkpoint as `save` does, but a thread writes beside the training until `finish` is called."""
        ...

    def load(self, folder: str) -> dict[str, object]:
        """Restore a checkpoint and return the `state` that was saved with it."""
        ...


class Policy(Passes, WeightExport, Checkpointing, Protocol):
    """It is the whole model with its optimizer; `mcore.policy.MegatronPolicy` is the real one."""


class Objective(Protocol):
    """This part computes coefficients from log ratios; `fibration.Objective` is the real one."""

    name: ClassVar[str]

    @property
    def uses_experts(self) -> bool:
        """This says whether it needs the tokens' expert shares."""
        ...

    @property
    def spans_micro_batches(self) -> bool:
        """This says whether a token's coefficient depends on tokens of other trajectories."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """These are the keys that a call must pass."""
        ...

    @property
    def level_names(self) -> Sequence[str]:
        """These are the gated levels, fine to coarse; empty without any."""
        ...

    @property
    def weighting(self) -> str:
        """This is the objective's own kind of token weights, one of `fibration.WEIGHTINGS`."""
        ...

    def __call__(
        self,
        log_ratio: Tensor,
        advantages: Tensor,
        weights: Tensor,
        *,
        keys: Mapping[str, Tensor],
        counts: Mapping[str, int],
        labels: Mapping[str, Tensor],
        expert_share: Tensor | None,
        old_log_probs: Tensor,
        reduce: Callable[[Tensor], Tensor] | None,
        metrics: bool,
    ) -> Any:
        """Return an output with `gradient` [n] and, when asked for metrics, `metrics`, this rank's `amplification` and
        a `trace` that explains single tokens (see `fibration.Objective`)."""
        ...


class AdvantageEstimator(Protocol):
    """It gives every trajectory of a step its advantage."""

    def __call__(self, rollouts: RolloutBatch) -> NDArray[np.float32]:
        """Return one advantage for each trajectory; `rollouts` has one entry for each (`per_trajectory`)."""
        ...


class ConversationEncoder(Protocol):
    """It turns what an environment says into tokens, and what the policy says into text; `data.encoding.Encoder` is the
    real one."""

    def first(
        self, prompt: Prompt, new: str | Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[int, ...]:
        """Return the tokens with which a conversation begins, when its first words are `new`."""
        ...

    def following(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        new: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, ...]:
        """Return the tokens between the response so far and the next turn. ValueError when nothing can follow."""
        ...

    def text(self, token_ids: Sequence[int], stop: Sequence[str] = (), special: bool = False) -> str:
        """Return a turn's text, without the token or character that ended it.

        special: keep the text of special tokens, with which many models begin their tool calls.
        """
        ...

    def tokens_with(self, characters: Sequence[str]) -> tuple[int, ...]:
        """Return the ids of all tokens that contain one of these characters."""
        ...


@dataclass(frozen=True)
class SamplingChange:
    """It says how an evaluation samples where that differs from the run; None stands for the run's own setting.

    Training never uses one: its log-probs are those of the run's sampling.
    """

    temperature: float | None = None
    """0 takes the most likely token."""
    top_p: float | None = None
    max_response_tokens: int | None = None


class Sampler(Protocol):
    """This part samples from the policy that was published last, and scores tokens with it."""

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
        priority: int = 0,
        track: Track | None = None,
        known_routes: int = 0,
        segments: "Segments | None" = None,
    ) -> list[Completion]:
        """Return one response to the prompt (token ids) for each seed. The limits narrow those of the run, which an
        evaluation may `change`. Where requests wait for each other, those of the lowest `priority` number come
        first. `track` gets what is done for its trajectory, and when. Where the experts of tokens are asked for, the
        response has those of the positions from `known_routes` on."""
        ...

    def score(self, token_ids: Sequence[int]) -> Mapping[int, ArrayLike]:
        """Return the log-probs [len - 1] of token_ids[1:] at temperature 1 by the number of the engine."""
        ...


class Segments(Protocol):
    """It keeps the segments of the responses of one step on disk, each of which one request has sampled."""

    def earlier(self, prompt: Sequence[int], seed: int) -> list[Completion]:
        """Return the segments of the response that an earlier start of the run left, without a gap from the response's
        beginning on. A response is known by its prompt (token ids) and the seed of its draws."""
        ...

    def ended(self, prompt: Sequence[int], seed: int, begin: int, segment: Completion) -> None:
        """Keep a segment that has ended, before which its response had `begin` tokens."""
        ...


class Scorer(Protocol):
    """It scores what the policy said with another model, such as a teacher's."""

    async def log_probs(self, prompt: Sequence[int], response: Sequence[int]) -> NDArray[np.float32]:
        """Return [T], the log-prob of each token of `response` given all tokens before it, at temperature 1; nan where
        it is not known."""
        ...


class Publisher(Protocol):
    """It carries weights to the engines."""

    def publish(self, source: WeightSource, version: str) -> None:
        """Load the source's weights into every engine as `version`. Every rank calls it."""
        ...


class Evaluated(NamedTuple):
    """It is what an evaluation of one set gives."""

    rollouts: RolloutBatch
    """All trajectories, equal on every rank."""
    prompts: list[dict[str, Any]]
    """Results by prompt (`evaluation.results.prompt_result`) on rank 0; empty on the others."""


class RolloutSource(Protocol):
    """It gives each step its trajectories, and takes the weights that the step made. Every rank calls all methods."""

    def take(self, step: int, version: int | None = None) -> RolloutBatch | None:
        """Return the trajectories of training step `step`, equal on every rank; an empty batch where a filter has
        dropped all of them; None, on every rank, when any rank was asked to stop before they were complete. `version`:
        that of the weights, where it is not `step`."""
        ...

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        """Let training have the devices' memory inside. `publishes` says that the engines get weights before they
        generate again, so that they need not keep theirs."""
        ...

    def publish(self, version: int) -> None:
        """Give the engines the policy's current weights as `version`, the number of steps that made them."""
        ...

    def held_out(self, version: int, of: EvaluationSet | None = None) -> Evaluated | None:
        """Return trajectories on the prompts of an evaluation set, sampled with the weights `version`; None when it has
        no prompts, or when there are no engines. Without `of` it is the default set."""
        ...

    def observe(self, rollouts: RolloutBatch) -> Mapping[str, float]:
        """Look at a step's trajectories, which may move a curriculum; return metrics."""
        ...

    def quarantine(self, engines: Sequence[int], why: str) -> None:
        """Note engines, named by their numbers, whose log-probs are not the trainer's: nothing more is sampled by them
        once every rank has called `observe`."""
        ...

    def saved(self, done: int) -> None:
        """Note that a checkpoint holds the first `done` steps: what was kept for a resume is no longer needed."""
        ...

    def state(self) -> Mapping[str, object]:
        """Return what a resumed run needs beside the step, as JSON values."""
        ...

    @property
    def domains(self) -> Sequence[str]:
        """These are the names of the environments, in the order of `RolloutBatch.domains`."""
        ...


class Recorder(Protocol):
    """It writes metrics and samples. It is called on every rank and writes on those that should."""

    def record(self, kind: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record. In "train" and "sft" records `step` is the step's index from 0, in "eval" records the
        number of steps done."""
        ...

    def rollouts(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        kind: Any = "train",
        *,
        places: Sequence[int] | None = None,
        looked_at: Sequence[RolloutGroup] | None = None,
    ) -> None:
        """Write a few trajectories for people to read: of training step `step`, or ("eval") of the evaluation after
        `step` steps. Every rank calls it, with the groups that it has generated.

        `places`: the place of each group in the step; None: those of all ranks come one after the other. `looked_at`:
        the groups whose solved trajectories are counted, where a filter has dropped some of them.
        """
        ...

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the results of the evaluation after `step` steps: `settings`, `metrics` and `prompts` of each set.
        Every rank calls it; rank 0 writes."""
        ...

    def stopping(self) -> str | None:
        """Return the words of the alarm that stops the run; None without one, and on ranks that do not log."""
        ...


class Checkpoints(Protocol):
    """It keeps the run's checkpoints."""

    def save(
        self,
        policy: Policy,
        step: int,
        *,
        prompts: Mapping[str, object],
        measured: Mapping[str, float],
        terms: Mapping[str, object] | None = None,
    ) -> None:
        """Begin to save the state after `step` steps. `measured` holds the step's metrics as "train/..." and
        "eval/...", `terms` the JSON values that the objective's terms keep."""
        ...

    def complete(self, wait: bool) -> int:
        """Finish what an asynchronous save has written or, if asked, wait for it. Every rank calls it.

        Returns the last step of this run that a checkpoint holds, 0 if none does."""
        ...
