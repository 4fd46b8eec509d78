"""What crosses a boundary between parts: one type per stage, frozen, shapes documented.

B trajectories, N tokens of all trajectories (prompts included), t local positions of one packed row,
n local response tokens. "Response token" is a token that the policy chose and that is trained on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EXIT_STOPPED = 85
"""Exit code of a run that was asked to stop, saved a checkpoint and goes on with --resume."""


@dataclass(frozen=True)
class Prompt:
    """One problem of a prompt set."""

    index: int
    """Position in its domain's prompt set (stable over runs)."""
    domain: int
    """Index of the domain in `data.tasks`."""
    token_ids: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True)
class WeightSpan:
    """Response tokens [start, end) were sampled with the weights of `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """What follows a prompt: one sampled response as the engine returned it, or a conversation's turns joined."""

    token_ids: tuple[int, ...]
    log_probs: NDArray[np.float32]
    """[T] log-probs of `token_ids` under the sampling policy at the sampling temperature; 0 where not sampled."""
    finish_reason: str
    """stop, length or abort."""
    weight_spans: tuple[WeightSpan, ...]
    """Versions of the weights that produced the response, in token order."""
    routed_experts: NDArray[np.int32] | None = None
    """[prompt + T - 1, layers, top_k] experts of every position but the last; None when not asked for."""
    loss_mask: NDArray[np.bool_] | None = None
    """[T] True at the tokens that the policy sampled, False at those that an environment wrote between turns. None:
    all were sampled."""


@dataclass(frozen=True)
class Trajectory:
    """A scored response."""

    prompt: Prompt
    completion: Completion
    text: str
    """Readable; the turns of a conversation are headed by their roles."""
    reward: float
    correct: bool


@dataclass(frozen=True)
class RolloutGroup:
    """All trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True)
class RolloutBatch:
    """All trajectories of one training step as flat arrays, equal on every rank, groups contiguous."""

    tokens: NDArray[np.int64]
    """[N] token ids, trajectory after trajectory."""
    response_mask: NDArray[np.bool_]
    """[N] True at response tokens. In a conversation it has holes: the environment's turns are no response tokens."""
    rollout_log_probs: NDArray[np.float32]
    """[N] the engine's log-probs at response tokens, 0 elsewhere."""
    lengths: NDArray[np.int64]
    """[B] tokens of each trajectory."""
    rewards: NDArray[np.float32]
    """[B]"""
    correct: NDArray[np.bool_]
    """[B]"""
    groups: NDArray[np.int64]
    """[B] dense group index, non-decreasing."""
    domains: NDArray[np.int64]
    """[B] domain index."""
    truncated: NDArray[np.bool_]
    """[B] True where the response was cut by the length limit."""
    routed_experts: NDArray[np.int16] = field(default_factory=lambda: np.zeros((0, 0, 0), np.int16))
    """[N, MoE layers, top_k] the engine's experts of each token, -1 where it gave none (the last token of a
    trajectory); empty when it was not asked."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[B + 1] start of each trajectory in the flat arrays."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """[B] response tokens of each trajectory."""
        running = np.concatenate([[0], np.cumsum(self.response_mask)])
        return np.diff(running[self.offsets]).astype(np.int64)

    @property
    def turns(self) -> NDArray[np.int64]:
        """[B] turns of the policy in each trajectory: runs of response tokens."""
        begins = self.response_mask & ~np.concatenate([[False], self.response_mask[:-1]])
        return np.add.reduceat(begins, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """One packed row (THD) as one context-parallel rank holds it.

    Sequences of the row are padded to the layout's multiple; context-parallel rank r of c holds the zigzag
    chunks r and 2c-1-r of each sequence. `labels[p]` is the token after position p of the same sequence.
    """

    tokens: Tensor
    """int64 [t] input tokens (0 at padding)."""
    position_ids: Tensor
    """int64 [t] position inside its sequence."""
    labels: Tensor
    """int64 [t] next token (0 where there is none)."""
    response_positions: Tensor
    """int64 [n] local positions whose label is a response token, ascending."""
    response_tokens: Tensor
    """int64 [n] index of that label in the RolloutBatch's flat arrays."""
    source_tokens: Tensor
    """int64 [t] index of the input token in the RolloutBatch's flat arrays, -1 at padding."""
    cu_seqlens: Tensor
    """int32 [S + 1] padded boundaries of the row's S sequences before the context-parallel cut."""
    max_seqlen: int
    """Longest padded sequence of the row, before the context-parallel cut."""


@dataclass(frozen=True)
class TokenScores:
    """The policy's view of this rank's response tokens, in micro-batch order."""

    log_probs: Tensor
    """float32 [n]"""
    entropy: Tensor
    """float32 [n] entropy of the next-token distribution, in nats."""


@dataclass(frozen=True)
class Coefficients:
    """What an objective says about this rank's response tokens (docs/fibration.md, gradient in closed form)."""

    gradient: Tensor
    """[n] c_j = dJ / d log pi(a_j); J is maximised."""
    metrics: Mapping[str, float] = field(default_factory=dict)


Gate = Callable[[Tensor, slice], Coefficients]
"""(log_probs [n] of the local response tokens in `slice`, that slice) -> Coefficients. The slice covers all local
response tokens of the mini-batch, or one micro-batch's in the single-pass way."""


@dataclass(frozen=True)
class OptimizerStep:
    """Outcome of one optimiser step."""

    gradient_norm: float
    learning_rate: float
    coefficients: tuple[Coefficients, ...]
    """One per call of the gate; empty on ranks that are not on the last pipeline stage."""
    extra_forward: bool
    """Whether the no-gradient pass was run."""


class Layout(Protocol):
    """Where this process stands; the trainer asks nothing else of the parallel layout."""

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    expert_size: int
    is_leader: bool
    """First rank of its data-parallel replica: it generates that replica's share of the prompts."""
    is_last_stage: bool
    """Holds the log-probs."""
    is_logger: bool
    """The one rank that writes metrics: last pipeline stage, first in every other dimension."""
    sequence_multiple: int
    """Every packed sequence is padded to a multiple of this."""
    micro_batch_multiple: int
    """The number of micro-batches of a step should be a multiple of this (interleaved pipeline); more are made up
    of padding."""

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """Sum a float64 tensor over the data x context parallel ranks."""
        ...

    def max_over_tokens(self, x: Tensor) -> Tensor:
        """Maximum of a float64 tensor over the data x context parallel ranks."""
        ...

    def gather_rollouts(self, share: RolloutBatch | None) -> RolloutBatch:
        """Join the leaders' shares in data-parallel order; every rank calls it, leaders with their share."""
        ...

    def share_text(self, text: str | None) -> str:
        """Rank 0's text on every rank; others pass None."""
        ...

    def agree(self, error: str | None, where: str, reraise: bool = True) -> None:
        """Every rank calls it with its error or None; if any rank passed one, those with `reraise` raise one
        RuntimeError that names the first failing rank, `where` and the error."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank passed True; every rank calls it and gets the same answer."""
        ...

    def barrier(self) -> None: ...


class Routing(Protocol):
    """The experts of every token of a step, as the policy recorded them or as they were filled in."""

    num_experts: int
    """Experts of a MoE layer; 0 in a dense model."""

    def clear(self) -> None:
        """Forget the records."""
        ...

    def fill(self, experts: Tensor) -> None:
        """Take [N, MoE layers, top_k] by flat token index, -1 where there is none."""
        ...

    def expert_counts(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """float32 [n, experts]: routed (layer, slot) pairs of the position that predicts each response token."""
        ...

    def agreement(self, micro_batches: Sequence[MicroBatch], experts: Tensor) -> Tensor:
        """float64 [MoE layers, 2]: (tokens whose expert set equals the record's, tokens compared), all ranks."""
        ...


class PendingSave(Protocol):
    """A checkpoint that is being written; every rank calls the methods."""

    def written(self) -> bool:
        """Whether `finish` would not wait; the same on every rank."""
        ...

    def finish(self) -> None:
        """Complete the checkpoint. Raises on every rank, with the cause, when a file could not be written."""
        ...


RoutingMode = Literal["off", "record", "replay"]


class Policy(Protocol):
    """The trainer's face of the model."""

    @property
    def routing(self) -> Routing: ...

    @property
    def layout(self) -> Layout: ...

    def log_probs(
        self, micro_batches: Sequence[MicroBatch], temperature: float, *, routing: RoutingMode = "off"
    ) -> TokenScores | None:
        """Forward without gradient; scores on the last pipeline stage, None elsewhere. `routing`: whether the experts
        of every token are recorded, or taken from the record."""
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
        """One optimiser step that maximises the gate's objective.

        `log_probs` are this rank's current ones when they are already known (the first step on a fresh batch; empty
        on ranks that are not on the last stage): the no-gradient pass is then skipped, as it is with `single_pass`,
        where the gate sees one micro-batch at a time. Raises FloatingPointError before the weights move when a
        gradient is not finite.
        """
        ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and full tensors, one at a time. Every rank iterates; rank 0 gets the tensors,
        other ranks get empty ones."""
        ...

    def release_memory(self) -> None:
        """Leave the device's memory, but for the parameters, to somebody else; no step and no save until it is
        restored."""
        ...

    def restore_memory(self) -> None:
        """Undo `release_memory` without a trace in the results."""
        ...

    def save(self, folder: str, state: Mapping[str, object]) -> None: ...

    def begin_save(self, folder: str, state: Mapping[str, object]) -> "PendingSave":
        """As `save`, written by a thread beside the training until `finish` is called."""
        ...

    def load(self, folder: str) -> dict[str, object]: ...


def response_slices(micro_batches: Sequence[MicroBatch]) -> list[slice]:
    """The range of each micro-batch's response tokens among this rank's."""
    ends = np.cumsum([len(m.response_tokens) for m in micro_batches], dtype=np.int64).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends)]


def concatenated_response_tokens(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """int64 [n] flat indices of this rank's response tokens, in micro-batch order."""
    return torch.cat([m.response_tokens for m in micro_batches])
