"""This module defines what crosses a boundary between parts: one type per stage, frozen, shapes documented.

B token sequences (each trajectory has one, and one more for each of its branches), N tokens of all sequences (prompts
included), t local positions of one packed row, n local response tokens. "Response token" is a token that the policy
chose and that is trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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


def expert_dtype(experts: int) -> np.dtype[Any]:
    """Return the smallest type that holds the ids of so many experts: uint8 for up to 256 of them, int16 beyond."""
    return np.dtype(np.uint8 if experts <= 256 else np.int16)


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
    routed_experts: NDArray[Any] | None = None
    """[prompt + T - 1, layers, top_k] uint8 or int16, the experts of every position but the last; in an answer that
    goes on behind earlier ones, those of the positions that these do not have. None when not asked for."""
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
class TokenSequence:
    """This is what the policy read and sampled in one context, token by token."""

    prompt_ids: tuple[int, ...]
    """Tokens before the completion."""
    completion: Completion

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """Return [T], True at the tokens of the completion that the policy sampled."""
        completion = self.completion
        return np.ones(len(completion.token_ids), np.bool_) if completion.loss_mask is None else completion.loss_mask


@dataclass(frozen=True)
class Branch(TokenSequence):
    """This is a token sequence of a trajectory beside its first one: an agent rewrote the past, and the policy sampled
    on from there (docs/fibration.md, Branches of a trajectory).

    Only tokens that were sampled in this sequence are response tokens. What it repeats from another sequence of its
    trajectory belongs into `prompt_ids`, or is False in the completion's `loss_mask`, so that every sampled token
    counts once. Raises ValueError without a prompt, and without a sampled token: such a sequence trains nothing.
    """

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.sampled.any():
            raise ValueError(
                f"a branch has {len(self.prompt_ids)} tokens before its completion and {int(self.sampled.sum())} "
                "sampled ones; it needs at least one of each: leave out a branch in which nothing was sampled"
            )


@dataclass(frozen=True)
class Trajectory:
    """This is a scored response; an agent that rewrites the past gives it further token sequences."""

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
    branches: tuple[Branch, ...] = ()
    """Token sequences beside `prompt` and `completion`, in the order in which they began. They share the trajectory's
    reward, key and length."""
    answer: str | None = None
    """The final answer that votes in maj@n, as the environment gave it; None: the stripped text votes."""

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """Return all token sequences of the trajectory, its own first."""
        return (TokenSequence(self.prompt.token_ids, self.completion), *self.branches)


@dataclass(frozen=True)
class RolloutGroup:
    """These are all trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


TRAJECTORY, SEQUENCE, TOKEN, NAMED, HELD = "trajectory", "sequence", "token", "named", "held"
"""What an array of a RolloutBatch is a fact of. TRAJECTORY, SEQUENCE and NAMED ones have one entry per sequence: facts
of a TRAJECTORY are equal in all of its sequences, and NAMED ones are such facts in a mapping from names to arrays. HELD
ones belong to the process that holds them, whatever part of the batch is looked at."""
NUMBERED = ("groups", "trajectories")
"""Arrays of dense numbers, which begin at 0 again wherever batches are joined or thinned out."""


def _array(
    dtype: type,
    per: str,
    fill: object = None,
    of: Callable[[Any], Any] | None = None,
    empty: tuple[int, ...] | None = None,
) -> Any:
    """Declare an array of RolloutBatch: everything that packs, exchanges, stores or joins batches reads it here.

    `fill` is the value where nothing is known: in files of older versions, in batches made without engines. `of` takes
    the values out of a Trajectory or, if `per` is SEQUENCE or TOKEN, out of a TokenSequence: one number, or (per token)
    one for each token of prompt and response. `empty`: the shape that stands for a fact of tokens that was not asked
    for; `of` then gives None.
    """
    metadata = {"dtype": np.dtype(dtype), "per": per, "fill": fill, "of": of, "empty": empty}
    return field(metadata=metadata)


def _tokens(sequence: TokenSequence) -> list[int]:
    return [*sequence.prompt_ids, *sequence.completion.token_ids]


def _behind_prompt(sequence: TokenSequence, values: Any, fill: object) -> NDArray[Any]:
    """Return per-token values of a response with `fill` at the prompt's tokens."""
    values = np.asarray(values)
    return np.concatenate([np.full(len(sequence.prompt_ids), fill, values.dtype), values])


def _engines(sequence: TokenSequence) -> NDArray[np.int16]:
    engines = sequence.completion.engines
    return np.where(sequence.sampled, 0, -1) if engines is None else engines


def _versions(sequence: TokenSequence) -> NDArray[np.int64]:
    versions = np.full(len(sequence.completion.token_ids), -1, np.int64)
    for span in sequence.completion.weight_spans:
        versions[span.start : span.end] = int(span.version) if span.version.isdecimal() else -1
    return versions


def _routes(sequences: Sequence[TokenSequence]) -> dict[str, NDArray[Any]]:
    """Return the arrays of the engines' routes, and an empty mapping when the engines were not asked for them.

    Raises ValueError where a token has no route, or a route no token: all others behind it would be those of other
    tokens.
    """
    found = [sequence.completion.routed_experts for sequence in sequences]
    given = [experts for experts in found if experts is not None]
    if not given:
        return {}
    lengths = np.array([len(_tokens(sequence)) for sequence in sequences])
    for number, (experts, length) in enumerate(zip(found, lengths.tolist(), strict=True)):
        given_to = 0 if experts is None else len(experts)
        if given_to != length - 1:
            lacking, excess = f"token {given_to} has no route", f"{given_to - length + 1} routes have no token"
            what = lacking if given_to < length - 1 else excess
            raise ValueError(
                f"expert routing: sequence {number} of {len(found)} has {length} tokens and {given_to} routes, so "
                f"that {what}; every token but the last one of a sequence has one route: what samples or joins "
                "responses must keep them"
            )
    starts = np.cumsum(lengths) - lengths
    rows = [np.arange(start, start + len(experts)) for start, experts in zip(starts, given, strict=True)]
    return {
        "routing_rows": np.arange(lengths.sum()),
        "held_rows": np.concatenate(rows),
        "routed_experts": np.concatenate(given),
    }


def _scores(name: str) -> Callable[[TokenSequence], NDArray[np.float32] | None]:
    """Return what takes the scores of another model, a field of Completion, out of a sequence."""

    def of(sequence: TokenSequence) -> NDArray[np.float32] | None:
        values = getattr(sequence.completion, name)
        return None if values is None else _behind_prompt(sequence, values, np.nan)

    return of


def _truncated(trajectory: Trajectory) -> bool:
    return any(sequence.completion.finish_reason == "length" for sequence in trajectory.sequences)


@dataclass(frozen=True)
class RolloutBatch:
    """These are all trajectories of one training step as flat arrays, equal on every rank except for the routes.

    There is one entry [B] for each token sequence; those of a trajectory are contiguous, and so are the trajectories of
    a group. What counts or compares trajectories takes `per_trajectory()`, which is the batch itself where no
    trajectory has branches.

    A fact is added by one line here: its dtype, what it is a fact of, its value where nothing is known, and where it
    stands in a trajectory or a sequence.
    """

    tokens: NDArray[np.int64] = _array(np.int64, TOKEN, of=_tokens)
    """[N] token ids, sequence after sequence."""
    response_mask: NDArray[np.bool_] = _array(np.bool_, TOKEN, of=lambda s: _behind_prompt(s, s.sampled, False))
    """[N] True at response tokens. In a conversation it has holes: the environment's turns are no response tokens."""
    rollout_log_probs: NDArray[np.float32] = _array(
        np.float32, TOKEN, 0.0, lambda s: _behind_prompt(s, s.completion.log_probs, 0.0)
    )
    """[N] the engine's log-probs at response tokens, 0 elsewhere."""
    weight_versions: NDArray[np.int64] = _array(np.int64, TOKEN, -1, lambda s: _behind_prompt(s, _versions(s), -1))
    """[N] version of the weights that sampled a response token, -1 elsewhere and where it is not known."""
    engines: NDArray[np.int16] = _array(np.int16, TOKEN, -1, lambda s: _behind_prompt(s, _engines(s), -1))
    """[N] index of the engine that sampled a response token, -1 elsewhere and where it is not known."""
    lengths: NDArray[np.int64] = _array(np.int64, SEQUENCE, of=lambda s: len(_tokens(s)))
    """[B] tokens of each sequence."""
    trajectories: NDArray[np.int64] = _array(np.int64, SEQUENCE, np.arange)
    """[B] dense index of the trajectory, non-decreasing; a trajectory that has no branches has one sequence."""
    rewards: NDArray[np.float32] = _array(np.float32, TRAJECTORY, 0.0, lambda t: t.reward)
    """[B]"""
    correct: NDArray[np.bool_] = _array(np.bool_, TRAJECTORY, False, lambda t: t.correct)
    """[B]"""
    groups: NDArray[np.int64] = _array(np.int64, TRAJECTORY)
    """[B] dense group index, non-decreasing."""
    domains: NDArray[np.int64] = _array(np.int64, TRAJECTORY, 0, lambda t: t.prompt.domain)
    """[B] domain index."""
    truncated: NDArray[np.bool_] = _array(np.bool_, TRAJECTORY, False, _truncated)
    """[B] True where the response was cut by the length limit; of branches, where any of them was."""
    failed: NDArray[np.bool_] = _array(np.bool_, TRAJECTORY, False, lambda t: t.failure is not None)
    """[B] True where the environment failed and the trajectory was kept with reward 0."""
    reward_parts: Mapping[str, NDArray[np.float32]] = _array(np.float32, NAMED, np.nan, lambda t: t.rewards)
    """[B] by name: components of the reward, nan where a trajectory has none of that name."""
    environment_metrics: Mapping[str, NDArray[np.float32]] = _array(np.float32, NAMED, np.nan, lambda t: t.metrics)
    """[B] by name: further numbers of the environments, nan where a trajectory has none of that name."""
    routing_rows: NDArray[np.int32] = _array(np.int32, TOKEN, empty=(0,))
    """[N] the number of each token among all tokens of the step, by which `held_rows` name it; empty when the engines
    were not asked for their routes."""
    held_rows: NDArray[np.int64] = _array(np.int64, HELD, empty=(0,))
    """[H] which tokens `routed_experts` belong to. The last token of a sequence is not among them: an engine has not
    read it."""
    routed_experts: NDArray[Any] = _array(np.uint8, HELD, empty=(0, 0, 0))
    """[H, MoE layers, top_k] uint8 or int16, the engines' experts of those tokens whose routes this process has: the
    ones that it generated itself. `Layout.routes` brings them to the ranks that need them."""
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
        `lengths` and `groups` must be given; others may have any dtype that converts. Without `trajectories` each
        sequence is one of its own."""
        sizes = dict.fromkeys((TRAJECTORY, SEQUENCE), len(arrays["lengths"])) | {TOKEN: len(arrays["tokens"])}
        values: dict[str, Any] = {}
        for fact in fields(cls):
            dtype, per, fill = (fact.metadata[key] for key in ("dtype", "per", "fill"))
            if per == NAMED:
                values[fact.name] = {n: np.asarray(v, dtype) for n, v in arrays.get(fact.name, {}).items()}
            elif per == HELD and fact.name in arrays:
                given = np.asarray(arrays[fact.name])
                values[fact.name] = given if given.dtype in (dtype, np.int16) else given.astype(dtype)
            elif fact.name in arrays:
                values[fact.name] = np.asarray(arrays[fact.name], dtype)
            elif fact.metadata["empty"] is not None:
                values[fact.name] = np.zeros(fact.metadata["empty"], dtype)
            elif callable(fill):
                values[fact.name] = np.asarray(fill(sizes[per]), dtype)
            else:
                values[fact.name] = np.full(sizes[per], fill, dtype)
        return cls(**values)

    def part(self, first: int, last: int) -> "RolloutBatch":
        """Return the sequences [first, last) as a batch whose arrays are views of this one's."""
        begin, end = int(self.lengths[:first].sum()), int(self.lengths[:last].sum())
        arrays: dict[str, Any] = {}
        for fact in fields(self):
            value, per = getattr(self, fact.name), fact.metadata["per"]
            if per == NAMED:
                arrays[fact.name] = {name: values[first:last] for name, values in value.items()}
            elif per == HELD:
                arrays[fact.name] = value
            else:
                arrays[fact.name] = value[begin:end] if per == TOKEN else value[first:last]
        return RolloutBatch(**arrays)

    def select(self, kept: NDArray[np.bool_]) -> "RolloutBatch":
        """Return the sequences that `kept` [B] marks as a batch whose groups and trajectories are numbered 0, 1, ...
        again."""
        tokens = np.repeat(kept, self.lengths)
        arrays: dict[str, Any] = {}
        for fact in fields(self):
            value, per = getattr(self, fact.name), fact.metadata["per"]
            if per == NAMED:
                arrays[fact.name] = {name: values[kept] for name, values in value.items()}
            elif per == HELD:
                arrays[fact.name] = value
            elif per == TOKEN:
                arrays[fact.name] = value[tokens] if len(value) == len(tokens) else value  # one that was not asked for
            else:
                arrays[fact.name] = value[kept]
        for name in NUMBERED:
            arrays[name] = np.unique(arrays[name], return_inverse=True)[1].astype(np.int64)
        return RolloutBatch(**arrays)

    def per_trajectory(self) -> "RolloutBatch":
        """Return the batch with one entry for each trajectory: the same tokens, and lengths over all of its sequences.

        It counts, compares and averages trajectories, response tokens and turns. It cannot be packed: a sequence must
        not attend to another one.
        """
        first = np.flatnonzero(np.diff(self.trajectories, prepend=-1))
        if len(first) == len(self.lengths):
            return self
        arrays: dict[str, Any] = {}
        for fact in fields(self):
            value, per = getattr(self, fact.name), fact.metadata["per"]
            if per == NAMED:
                arrays[fact.name] = {name: values[first] for name, values in value.items()}
            else:
                arrays[fact.name] = value if per in (TOKEN, HELD) else value[first]
        return RolloutBatch(**arrays | {"lengths": np.add.reduceat(self.lengths, first)})

    def without_held(self) -> "RolloutBatch":
        """Return the batch without the routes that this process holds; which tokens have any stays known."""
        none: dict[str, Any] = {
            fact.name: np.zeros(fact.metadata["empty"], fact.metadata["dtype"]) for fact in _HELD_FACTS
        }
        return replace(self, **none)

    @property
    def sequences(self) -> NDArray[np.int64]:
        """This is the number of sequences of each trajectory, one per trajectory: its own and its branches."""
        return np.bincount(self.trajectories - self.trajectories[0]) if len(self.lengths) else self.lengths

    @property
    def offsets(self) -> NDArray[np.int64]:
        """This is [B + 1], the start of each sequence in the flat arrays."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """This is [B], the number of response tokens of each sequence."""
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
        """This is [B], the turns of the policy in each sequence: runs of response tokens."""
        return np.add.reduceat(self.turn_begins, self.offsets[:-1], dtype=np.int64)


_HELD_FACTS = [fact for fact in fields(RolloutBatch) if fact.metadata["per"] == HELD]


def flatten(groups: Sequence[RolloutGroup]) -> RolloutBatch:
    """Return the flat arrays of a leader's groups, which are numbered from 0. A group without trajectories, because
    all were dropped, gets no number."""
    trajectories = [t for group in groups for t in group.trajectories]
    counts = np.array([len(t.sequences) for t in trajectories], np.int64)
    sequences = [sequence for t in trajectories for sequence in t.sequences]
    whole = [group for group in groups if group.trajectories]
    of_trajectory = np.array([g for g, group in enumerate(whole) for _ in group.trajectories], np.int64)
    arrays: dict[str, Any] = {
        "groups": np.repeat(of_trajectory, counts),
        "trajectories": np.repeat(np.arange(len(trajectories)), counts),
    }
    for fact in fields(RolloutBatch):
        dtype, per, fill, of = (fact.metadata[key] for key in ("dtype", "per", "fill", "of"))
        if of is None:
            continue
        values = [of(one) for one in (trajectories if per in (TRAJECTORY, NAMED) else sequences)]
        if per == NAMED:
            names = sorted({name for value in values for name in value})
            found = {n: np.array([v.get(n, fill) for v in values], dtype) for n in names}
            arrays[fact.name] = {n: np.repeat(array, counts) for n, array in found.items()}
        elif per == TRAJECTORY:
            arrays[fact.name] = np.repeat(np.array(values, dtype), counts)
        elif per == SEQUENCE:
            arrays[fact.name] = np.array(values, dtype)
        elif not any(value is None for value in values) and values:
            arrays[fact.name] = np.concatenate([np.asarray(value, dtype) for value in values])
        elif fact.metadata["empty"] is None:
            arrays[fact.name] = np.zeros(0, dtype)
    return RolloutBatch.filled(**arrays | _routes(sequences))


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
    """Return one batch of all shares in order; groups and trajectories are numbered 0, 1, ... through all of them."""
    filled = [share for share in shares if len(share.tokens)] or list(shares)
    arrays: dict[str, Any] = {}
    for fact in fields(RolloutBatch):
        parts = [getattr(share, fact.name) for share in filled]
        if fact.metadata["per"] == HELD:
            parts = [part for part in parts if len(part)] or parts[:1]
        if fact.metadata["per"] != NAMED:
            arrays[fact.name] = np.concatenate(parts)
            continue
        names = sorted({name for part in parts for name in part})
        missing = [np.full(len(share.lengths), fact.metadata["fill"], fact.metadata["dtype"]) for share in filled]
        arrays[fact.name] = {n: np.concatenate([p.get(n, m) for p, m in zip(parts, missing)]) for n in names}
    for name in NUMBERED:
        arrays[name] = _numbered([getattr(share, name) for share in shares])
    for name in ("routing_rows", "held_rows"):
        sizes = [int(share.routing_rows.max(initial=-1)) + 1 for share in filled]
        begins = np.cumsum(sizes) - sizes
        found = [getattr(share, name) for share in filled]
        arrays[name] = np.concatenate([rows + begin for rows, begin in zip(found, begins, strict=True)])
    return RolloutBatch.filled(**arrays)


def _numbered(shares: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the numbers of all shares, made dense through all of them."""
    joined, seen = [], 0
    for share in shares:
        labels, dense = np.unique(share, return_inverse=True)
        joined.append(dense.astype(np.int64) + seen)
        seen += len(labels)
    return np.concatenate(joined)


@dataclass(frozen=True)
class MicroBatch:
    """This is one packed row (THD) as one context-parallel rank holds it.

    Sequences of the row are padded to the layout's multiple; context-parallel rank r of c holds the zigzag
    chunks r and 2c-1-r of each sequence. `labels[p]` is the token after position p of the same sequence.
    """

    tokens: Tensor
    """int32 [t] input tokens (0 at padding)."""
    position_ids: Tensor
    """int32 [t] position inside its sequence."""
    labels: Tensor
    """int32 [t] next token (0 where there is none)."""
    response_positions: Tensor
    """int32 [n] local positions whose label is a response token, ascending."""
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
    kept_forwards: int = 0
    """Micro-batches of this rank that went on from the pass before, so that they took no forward pass of their own."""


def response_slices(micro_batches: Sequence[MicroBatch]) -> list[slice]:
    """Return the range of each micro-batch's response tokens among this rank's."""
    ends = np.cumsum([len(m.response_tokens) for m in micro_batches], dtype=np.int64).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends)]


def concatenated_response_tokens(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return int64 [n], the flat indices of this rank's response tokens, in micro-batch order."""
    return torch.cat([m.response_tokens for m in micro_batches])
