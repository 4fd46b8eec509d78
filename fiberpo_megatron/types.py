"""This module defines what crosses a boundary between parts: one type per stage, frozen, shapes documented.

B trajectories, N tokens of all trajectories (prompts included), t local positions of one packed row,
n local response tokens. "Response token" is a token that the policy chose and that is trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.environments import Split, Task

EXIT_STOPPED = 85
"""Exit code of a run that was asked to stop, saved a checkpoint and goes on with --resume."""

EXIT_ALARM = 86
"""Exit code of a run that an alarm has stopped (`action = "stop"`), after saving: somebody should look at it first."""

LONGEST_NUMBER = 4000
"""Digits of a task's id that is a number; Python reads no more than 4300."""


@dataclass(frozen=True)
class Prompt:
    """This is a task of an environment with the tokens of its prompt."""

    index: int
    """Position in its split of the environment (stable over runs)."""
    domain: int
    """Index of the environment in `environments`."""
    token_ids: tuple[int, ...]
    text: str
    """The prompt as the engine sees it."""
    task: Task
    split: Split = "train"

    @property
    def number(self) -> int | str:
        """Return what identifies the task inside its environment: its id, as a number where it is one, or its index
        where it has no id of its own. Sampling seeds and the digests of stored rollouts are made of it."""
        name = self.task.id
        if name is None or name.endswith(f"/{self.split}/{self.index}"):
            return self.index
        return int(name) if name.isdecimal() and len(name) <= LONGEST_NUMBER else name


@dataclass(frozen=True)
class WeightSpan:
    """Response tokens [start, end) were sampled with the weights of `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """This is what follows a prompt: one sampled response as the engine returned it, or the joined turns of a
    conversation."""

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
    engines: NDArray[np.int16] | None = None
    """[T] index of the engine that sampled each token, -1 where none did. None: engine 0 sampled all."""
    teacher_log_probs: NDArray[np.float32] | None = None
    """[T] log-probs of `token_ids` under the teacher at temperature 1, nan where it gave none; None when not asked."""
    reference_log_probs: NDArray[np.float32] | None = None
    """[T] the same under a served reference."""


@dataclass(frozen=True)
class Trajectory:
    """This is a scored response."""

    prompt: Prompt
    completion: Completion
    text: str
    """Readable; the turns of a conversation are headed by their roles."""
    reward: float
    correct: bool
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Components of the reward by name, as the environment gave them."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of the environment by name."""
    failure: str | None = None
    """Why the environment failed, where such a trajectory is kept with reward 0."""


@dataclass(frozen=True)
class RolloutGroup:
    """These are all trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


TRAJECTORY, TOKEN, NAMED = "trajectory", "token", "named"
"""What an array of a RolloutBatch has one entry for. NAMED means a mapping from names to arrays [B]."""


def _array(
    dtype: type,
    per: str,
    fill: object = None,
    of: Callable[[Trajectory], Any] | None = None,
    empty: tuple[int, ...] | None = None,
) -> Any:
    """Declare an array of RolloutBatch: everything that packs, exchanges, stores or joins batches reads it here.

    `fill` is the value where nothing is known: in files of older versions, in batches made without engines. `of` takes
    the values out of a trajectory: one number, or (per token) one for each token of prompt and response. `empty`: the
    shape that stands for a fact of tokens that was not asked for; `of` then gives None.
    """
    metadata = {"dtype": np.dtype(dtype), "per": per, "fill": fill, "of": of, "empty": empty}
    return field(metadata=metadata)


def _tokens(trajectory: Trajectory) -> list[int]:
    return [*trajectory.prompt.token_ids, *trajectory.completion.token_ids]


def _behind_prompt(trajectory: Trajectory, values: Any, fill: object) -> NDArray[Any]:
    """Return per-token values of a response with `fill` at the prompt's tokens."""
    values = np.asarray(values)
    return np.concatenate([np.full(len(trajectory.prompt.token_ids), fill, values.dtype), values])


def _sampled(trajectory: Trajectory) -> NDArray[np.bool_]:
    completion = trajectory.completion
    return np.ones(len(completion.token_ids), np.bool_) if completion.loss_mask is None else completion.loss_mask


def _engines(trajectory: Trajectory) -> NDArray[np.int16]:
    completion, sampled = trajectory.completion, _sampled(trajectory)
    return np.where(sampled, 0, -1) if completion.engines is None else completion.engines


def _versions(trajectory: Trajectory) -> NDArray[np.int64]:
    versions = np.full(len(trajectory.completion.token_ids), -1, np.int64)
    for span in trajectory.completion.weight_spans:
        versions[span.start : span.end] = int(span.version) if span.version.isdecimal() else -1
    return versions


def _experts(trajectory: Trajectory) -> NDArray[np.int16] | None:
    experts = trajectory.completion.routed_experts
    if experts is None:
        return None
    return np.concatenate([experts.astype(np.int16), np.full((1, *experts.shape[1:]), -1, np.int16)])


def _scores(name: str) -> Callable[[Trajectory], NDArray[np.float32] | None]:
    """Return what takes the scores of another model, a field of Completion, out of a trajectory."""

    def of(trajectory: Trajectory) -> NDArray[np.float32] | None:
        values = getattr(trajectory.completion, name)
        return None if values is None else _behind_prompt(trajectory, values, np.nan)

    return of


@dataclass(frozen=True)
class RolloutBatch:
    """These are all trajectories of one training step as flat arrays, equal on every rank, groups contiguous.

    A fact is added by one line here: its dtype, what it has one entry for, its value where nothing is known, and
    where in a trajectory it stands.
    """

    tokens: NDArray[np.int64] = _array(np.int64, TOKEN, of=_tokens)
    """[N] token ids, trajectory after trajectory."""
    response_mask: NDArray[np.bool_] = _array(np.bool_, TOKEN, of=lambda t: _behind_prompt(t, _sampled(t), False))
    """[N] True at response tokens. In a conversation it has holes: the environment's turns are no response tokens."""
    rollout_log_probs: NDArray[np.float32] = _array(
        np.float32, TOKEN, 0.0, lambda t: _behind_prompt(t, t.completion.log_probs, 0.0)
    )
    """[N] the engine's log-probs at response tokens, 0 elsewhere."""
    weight_versions: NDArray[np.int64] = _array(np.int64, TOKEN, -1, lambda t: _behind_prompt(t, _versions(t), -1))
    """[N] version of the weights that sampled a response token, -1 elsewhere and where it is not known."""
    engines: NDArray[np.int16] = _array(np.int16, TOKEN, -1, lambda t: _behind_prompt(t, _engines(t), -1))
    """[N] index of the engine that sampled a response token, -1 elsewhere and where it is not known."""
    lengths: NDArray[np.int64] = _array(np.int64, TRAJECTORY, of=lambda t: len(_tokens(t)))
    """[B] tokens of each trajectory."""
    rewards: NDArray[np.float32] = _array(np.float32, TRAJECTORY, 0.0, lambda t: t.reward)
    """[B]"""
    correct: NDArray[np.bool_] = _array(np.bool_, TRAJECTORY, False, lambda t: t.correct)
    """[B]"""
    groups: NDArray[np.int64] = _array(np.int64, TRAJECTORY)
    """[B] dense group index, non-decreasing."""
    domains: NDArray[np.int64] = _array(np.int64, TRAJECTORY, 0, lambda t: t.prompt.domain)
    """[B] domain index."""
    truncated: NDArray[np.bool_] = _array(np.bool_, TRAJECTORY, False, lambda t: t.completion.finish_reason == "length")
    """[B] True where the response was cut by the length limit."""
    failed: NDArray[np.bool_] = _array(np.bool_, TRAJECTORY, False, lambda t: t.failure is not None)
    """[B] True where the environment failed and the trajectory was kept with reward 0."""
    reward_parts: Mapping[str, NDArray[np.float32]] = _array(np.float32, NAMED, np.nan, lambda t: t.rewards)
    """[B] by name: components of the reward, nan where a trajectory has none of that name."""
    environment_metrics: Mapping[str, NDArray[np.float32]] = _array(np.float32, NAMED, np.nan, lambda t: t.metrics)
    """[B] by name: further numbers of the environments, nan where a trajectory has none of that name."""
    routed_experts: NDArray[np.int16] = _array(np.int16, TOKEN, None, _experts, empty=(0, 0, 0))
    """[N, MoE layers, top_k] the engine's experts of each token, -1 where it gave none (the last token of a
    trajectory); empty when it was not asked."""
    teacher_log_probs: NDArray[np.float32] = _array(np.float32, TOKEN, np.nan, _scores("teacher_log_probs"), empty=(0,))
    """[N] the teacher's log-probs at response tokens, at temperature 1; nan elsewhere and where it gave none; empty
    when no teacher was asked."""
    reference_log_probs: NDArray[np.float32] = _array(
        np.float32, TOKEN, np.nan, _scores("reference_log_probs"), empty=(0,)
    )
    """[N] the same of a served reference."""

    @classmethod
    def filled(cls, **arrays: Any) -> "RolloutBatch":
        """Return a batch of the given arrays, with the declared value in all others. `tokens`, `response_mask`,
        `lengths` and `groups` must be given; others may have any dtype that converts."""
        sizes = {TRAJECTORY: len(arrays["lengths"]), TOKEN: len(arrays["tokens"])}
        values: dict[str, Any] = {}
        for fact in fields(cls):
            dtype, per, fill = (fact.metadata[key] for key in ("dtype", "per", "fill"))
            if per == NAMED:
                values[fact.name] = {n: np.asarray(v, dtype) for n, v in arrays.get(fact.name, {}).items()}
            elif fact.name in arrays:
                values[fact.name] = np.asarray(arrays[fact.name], dtype)
            elif fact.metadata["empty"] is not None:
                values[fact.name] = np.zeros(fact.metadata["empty"], dtype)
            else:
                values[fact.name] = np.full(sizes[per], fill, dtype)
        return cls(**values)

    def part(self, first: int, last: int) -> "RolloutBatch":
        """Return the trajectories [first, last) as a batch whose arrays are views of this one's."""
        begin, end = int(self.lengths[:first].sum()), int(self.lengths[:last].sum())
        arrays: dict[str, Any] = {}
        for fact in fields(self):
            value, per = getattr(self, fact.name), fact.metadata["per"]
            if per == NAMED:
                arrays[fact.name] = {name: values[first:last] for name, values in value.items()}
            else:
                arrays[fact.name] = value[first:last] if per == TRAJECTORY else value[begin:end]
        return RolloutBatch(**arrays)

    def select(self, kept: NDArray[np.bool_]) -> "RolloutBatch":
        """Return the trajectories that `kept` [B] marks as a batch whose groups are numbered 0, 1, ... again."""
        tokens = np.repeat(kept, self.lengths)
        arrays: dict[str, Any] = {}
        for fact in fields(self):
            value, per = getattr(self, fact.name), fact.metadata["per"]
            if per == NAMED:
                arrays[fact.name] = {name: values[kept] for name, values in value.items()}
            elif per == TRAJECTORY:
                arrays[fact.name] = value[kept]
            else:
                arrays[fact.name] = value[tokens] if len(value) == len(tokens) else value  # one that was not asked for
        arrays["groups"] = np.unique(arrays["groups"], return_inverse=True)[1].astype(np.int64)
        return RolloutBatch(**arrays)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """This is [B + 1], the start of each trajectory in the flat arrays."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """This is [B], the number of response tokens of each trajectory."""
        running = np.concatenate([[0], np.cumsum(self.response_mask)])
        return np.diff(running[self.offsets]).astype(np.int64)

    @property
    def turn_begins(self) -> NDArray[np.bool_]:
        """This is [N], True at the first token of each turn of the policy."""
        begins = self.response_mask & ~np.concatenate([[False], self.response_mask[:-1]])
        begins[self.offsets[:-1]] |= self.response_mask[self.offsets[:-1]]
        return begins

    @property
    def turns(self) -> NDArray[np.int64]:
        """This is [B], the turns of the policy in each trajectory: runs of response tokens."""
        return np.add.reduceat(self.turn_begins, self.offsets[:-1], dtype=np.int64)


def flatten(groups: Sequence[RolloutGroup]) -> RolloutBatch:
    """Return the flat arrays of a leader's groups, which are numbered from 0. A group without trajectories, because
    all were dropped, gets no number."""
    trajectories = [t for group in groups for t in group.trajectories]
    whole = [group for group in groups if group.trajectories]
    arrays: dict[str, Any] = {
        "groups": np.array([g for g, group in enumerate(whole) for _ in group.trajectories], np.int64)
    }
    for fact in fields(RolloutBatch):
        dtype, per, fill, of = (fact.metadata[key] for key in ("dtype", "per", "fill", "of"))
        if of is None:
            continue
        values = [of(trajectory) for trajectory in trajectories]
        if per == NAMED:
            names = sorted({name for value in values for name in value})
            arrays[fact.name] = {n: np.array([v.get(n, fill) for v in values], dtype) for n in names}
        elif per == TRAJECTORY:
            arrays[fact.name] = np.array(values, dtype)
        elif not any(value is None for value in values) and values:
            arrays[fact.name] = np.concatenate([np.asarray(value, dtype) for value in values])
        elif fact.metadata["empty"] is None:
            arrays[fact.name] = np.zeros(0, dtype)
    return RolloutBatch.filled(**arrays)


def named_arrays(batch: RolloutBatch) -> dict[str, NDArray[Any]]:
    """Return all arrays of a batch by name; those of a mapping are named `mapping/name`."""
    arrays: dict[str, NDArray[Any]] = {}
    for fact in fields(RolloutBatch):
        value = getattr(batch, fact.name)
        arrays |= (
            {f"{fact.name}/{n}": v for n, v in value.items()} if fact.metadata["per"] == NAMED else {fact.name: value}
        )
    return arrays


def batch_of(arrays: Mapping[str, NDArray[Any]]) -> RolloutBatch:
    """Return the batch of arrays by name, as `named_arrays` gives them; missing ones get their declared values."""
    given: dict[str, Any] = {}
    for name, array in arrays.items():
        fact, slash, key = name.partition("/")
        if slash:
            given.setdefault(fact, {})[key] = array
        else:
            given[fact] = array
    return RolloutBatch.filled(**given)


def join_batches(shares: Sequence[RolloutBatch]) -> RolloutBatch:
    """Return one batch of all shares in order; groups are numbered 0, 1, ... through all of them."""
    groups = []
    seen = 0
    for share in shares:
        labels, dense = np.unique(share.groups, return_inverse=True)
        groups.append(dense.astype(np.int64) + seen)
        seen += len(labels)
    filled = [share for share in shares if len(share.tokens)] or list(shares)
    arrays: dict[str, Any] = {}
    for fact in fields(RolloutBatch):
        parts = [getattr(share, fact.name) for share in filled]
        if fact.metadata["per"] != NAMED:
            arrays[fact.name] = np.concatenate(parts)
            continue
        names = sorted({name for part in parts for name in part})
        missing = [np.full(len(share.lengths), fact.metadata["fill"], fact.metadata["dtype"]) for share in filled]
        arrays[fact.name] = {n: np.concatenate([p.get(n, m) for p, m in zip(parts, missing)]) for n in names}
    return RolloutBatch.filled(**{**arrays, "groups": np.concatenate(groups)})


@dataclass(frozen=True)
class MicroBatch:
    """This is one packed row (THD) as one context-parallel rank holds it.

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
    """These are the policy's scores of this rank's response tokens, in micro-batch order."""

    log_probs: Tensor
    """float32 [n]"""
    entropy: Tensor
    """float32 [n] entropy of the next-token distribution, in nats."""


@dataclass(frozen=True)
class Coefficients:
    """This is what an objective says about this rank's response tokens (docs/fibration.md, gradient in closed form)."""

    gradient: Tensor
    """[n] c_j = dJ / d log pi(a_j); J is maximised."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    entropy: Tensor | None = None
    """[n] e_j = dJ / dH_j, H_j the entropy of the distribution that token j was drawn from; None if J has no entropy
    in it, which costs nothing. A policy minimises -sum_j c_j log pi(a_j) - sum_j e_j H_j."""


Gate = Callable[[Tensor, slice], Coefficients]
"""(log_probs [n] of the local response tokens in `slice`, that slice) -> Coefficients. The slice covers all local
response tokens of the mini-batch, or one micro-batch's in the single-pass way."""


RoutingMode = Literal["off", "record", "replay"]
"""Whether a pass leaves the experts of every token alone, records them, or takes them from the record."""


@dataclass(frozen=True)
class OptimizerStep:
    """This is the outcome of one optimiser step."""

    gradient_norm: float
    learning_rate: float
    coefficients: tuple[Coefficients, ...]
    """One per call of the gate; empty on ranks that are not on the last pipeline stage."""
    extra_forward: bool
    """Whether the no-gradient pass was run."""


def response_slices(micro_batches: Sequence[MicroBatch]) -> list[slice]:
    """Return the range of each micro-batch's response tokens among this rank's."""
    ends = np.cumsum([len(m.response_tokens) for m in micro_batches], dtype=np.int64).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends)]


def concatenated_response_tokens(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return int64 [n], the flat indices of this rank's response tokens, in micro-batch order."""
    return torch.cat([m.response_tokens for m in micro_batches])
