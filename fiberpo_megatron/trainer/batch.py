"""This module cuts rollouts into the mini-batches of the optimiser: packed rows with token weights and keys."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.data.packing import (
    PackingEfficiency,
    assign_rows,
    pack,
    packing_efficiency,
    padded_lengths,
    split_trajectories,
)
from fiberpo_megatron.fibration import WEIGHTINGS
from fiberpo_megatron.fibration.levels import STATE_KEY
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.telemetry.metrics import combine
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.trainer.states import state_ids
from fiberpo_megatron.types import MicroBatch, RolloutBatch, concatenated_response_tokens

SUPPLIED_KEYS = ("turn", "trajectory", "prompt_group", "domain", "version", "engine", "state")
"""Keys by which an objective may group tokens. Expert partitions are no key: a token belongs to several of them."""


@dataclass(frozen=True)
class MiniBatch:
    """It is one optimiser step's trajectories as this rank holds them; n local response tokens."""

    micro_batches: list[MicroBatch]
    packing: PackingEfficiency
    advantages: Tensor
    """float32 [n]; those of a trajectory's tokens differ where a term rewards tokens (`trainer/terms`)."""
    weights: Tensor
    """float64 [n] mu: positive, 0 where a term leaves tokens out. With the weightings "seq-mean" and "token-mean" they
    sum to 1 over the mini-batch and all ranks. Once tokens have importance weights, mu' w (`trainer/importance`)."""
    keys: dict[str, Tensor]
    """int64 [n] per key (SUPPLIED_KEYS): dense ids inside the mini-batch; "state" is -1 for a state that was sampled
    once, and there only where it was asked for."""
    counts: dict[str, int]
    """Number of ids of each key over all ranks."""
    labels: dict[str, Tensor]
    """int64 [counts[key]] of some keys: the number by which budgets and branches name each id (`token_labels`)."""
    rollout_log_probs: Tensor
    """float32 [n]"""
    reference_log_probs: Tensor | None = None
    """float32 [n] of the tokens under the reference of `algorithm.kl`, at the run's temperature; None without one."""
    teacher_log_probs: Tensor | None = None
    """float32 [n] of the tokens under the teacher of `algorithm.distillation`, as its servers gave them: at temperature
    1, which is then the run's; nan where they gave none; None without a teacher."""
    term_values: dict[str, Tensor] = field(default_factory=dict)
    """[n] per name: what a term's `prepare` leaves for its calls in the gate."""
    importance: Tensor | None = None
    """float64 [n] w, which is in `weights` already; None if no token was weighed."""
    expert_share: Tensor | None = None
    """float64 [n, P] omega: share of each token's routed (layer, slot) pairs in each expert partition."""


def without_truncated(
    rollouts: RolloutBatch, advantages: NDArray[np.float32]
) -> tuple[RolloutBatch, NDArray[np.float32], dict[str, float]]:
    """Return the trajectories that were not cut by the length limit, with their advantages, and metrics.

    `advantages` is [B]. `rollouts` is equal on every rank, and so is the result. What is left out takes no part in a
    mini-batch: its tokens are in no gate and cost no pass, and the weights are those of the trajectories that are left,
    which may be none. A trajectory one of whose branches was cut is left out as a whole.
    """
    kept = ~rollouts.truncated
    share = 1.0 - float((~rollouts.per_trajectory().truncated).mean())
    metrics = {"truncated/left_out_share": share, "truncated/steps_without_training": float(not kept.any())}
    return rollouts.select(kept), advantages[kept], metrics


def mini_batches(
    rollouts: RolloutBatch,
    advantages: NDArray[np.float32],
    *,
    batch: BatchConfig,
    weighting: str,
    normaliser: float | None = None,
    domains: int,
    layout: Layout,
    version: int,
    states: bool = False,
) -> list[MiniBatch]:
    """Return the step's mini-batches: cut at group boundaries into `batch.mini_batches` parts and pack this rank's
    share of each.

    Which trajectories form a part does not depend on the layout. `advantages` is [B], equal in all sequences of a
    trajectory; `weighting` and `normaliser` say what `token_weights` gives each part, `domains` is the number of
    domains, `version` that of the trainer's weights; `states` asks for the key "state", which costs a search through
    the tokens.
    """
    weigh = partial(token_weights, weighting=weighting, normaliser=normaliser)
    edges = np.searchsorted(
        rollouts.groups, np.linspace(0, rollouts.groups[-1] + 1, batch.mini_batches + 1).round().astype(int)
    )
    return [
        _mini_batch(rollouts, advantages, int(first), int(last), batch, weigh, domains, layout, version, states)
        for first, last in zip(edges[:-1], edges[1:])
        if first < last  # a part is empty where environments dropped so many groups that fewer are left than parts
    ]


def _mini_batch(
    rollouts: RolloutBatch,
    advantages: NDArray[np.float32],
    first: int,
    last: int,
    batch: BatchConfig,
    weigh: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    domains: int,
    layout: Layout,
    version: int,
    states: bool,
) -> MiniBatch:
    micro_batches, efficiency = pack_share(rollouts, range(first, last), batch, layout)
    tokens = concatenated_response_tokens(micro_batches).numpy()
    sequence = np.searchsorted(rollouts.offsets, tokens, side="right") - 1
    part = rollouts.part(first, last)
    weights = weigh(part.per_trajectory().response_lengths)
    keys = token_keys(rollouts, first, last, domains, tokens)
    if states:
        ids, count = state_ids(part, 0, last - first)
        keys[STATE_KEY] = ids[tokens - rollouts.offsets[first]], count
    return MiniBatch(
        micro_batches=micro_batches,
        packing=efficiency,
        advantages=_tensor(advantages[sequence]),
        weights=_tensor(weights[rollouts.trajectories[sequence] - rollouts.trajectories[first]]),
        keys={name: _tensor(ids) for name, (ids, _) in keys.items()},
        counts={name: count for name, (_, count) in keys.items()},
        labels={name: torch.from_numpy(of) for name, of in token_labels(rollouts, first, last, version).items()},
        rollout_log_probs=_tensor(rollouts.rollout_log_probs[tokens]),
        reference_log_probs=_served(rollouts.reference_log_probs, tokens),
        teacher_log_probs=_served(rollouts.teacher_log_probs, tokens),
    )


def _served(log_probs: NDArray[np.float32], tokens: NDArray[np.int64]) -> Tensor | None:
    """What servers said about these tokens; None if none was asked."""
    return _tensor(log_probs[tokens]) if len(log_probs) else None


def _tensor(values: NDArray[Any]) -> Tensor:
    """Return the values on the host, in pinned memory where a GPU is to read them: no copy then waits for another."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def token_keys(
    rollouts: RolloutBatch, first: int, last: int, domains: int, tokens: NDArray[np.int64] | None = None
) -> dict[str, tuple[NDArray[np.int64], int]]:
    """Return per key (dense ids [n] of `tokens`, number of ids) of the mini-batch of sequences [first, last).

    `tokens` are flat indices [n], by default all of the batch. Their sequences alone are looked at, apart from two
    passes over the mini-batch: a rank has few of a large batch's tokens. All branches of a trajectory have its id; each
    of their turns has one of its own. The key "state" is not among the keys (`states.state_ids`). Ids of tokens outside
    the mini-batch, and of tokens that are no response tokens, mean nothing.
    """
    part, begin = rollouts.part(first, last), int(rollouts.offsets[first])
    tokens = np.arange(len(rollouts.tokens)) if tokens is None else tokens
    inside = (tokens - begin).clip(0, len(part.tokens) - 1)
    sequence = np.searchsorted(part.offsets, inside, side="right") - 1
    group, trajectory = part.groups - part.groups[0], part.trajectories - part.trajectories[0]
    turn = np.cumsum(part.turn_begins) - 1
    keys = {
        "turn": (turn[inside], int(part.turns.sum())),
        "trajectory": (trajectory[sequence], int(trajectory[-1]) + 1),
        "prompt_group": (group[sequence], int(group[-1]) + 1),
        "domain": (part.domains[sequence], domains),
    }
    for name, values in (("version", part.weight_versions), ("engine", part.engines)):
        seen = _seen(part, values)
        keys[name] = (np.searchsorted(seen, values[inside]).clip(max=len(seen) - 1), len(seen))
    return {name: (ids.astype(np.int64), count) for name, (ids, count) in keys.items()}


def token_labels(rollouts: RolloutBatch, first: int, last: int, version: int) -> dict[str, NDArray[np.int64]]:
    """Return the number of each id of `token_keys`, by which budgets and branches name it, where that is not the id.

    That of a turn is its place in its trajectory, from 0, through all branches; that of a version is its lag, how far
    it lies behind `version`, the trainer's; that of an engine is the engine's. -1 says that it is not known, or that a
    version is none of this run (it is ahead of the trainer's).
    """
    part = rollouts.part(first, last)
    versions = _seen(part, part.weight_versions)
    return {
        "turn": np.concatenate([np.arange(turns) for turns in part.per_trajectory().turns]).astype(np.int64),
        "version": np.where((versions >= 0) & (versions <= version), version - versions, -1).astype(np.int64),
        "engine": _seen(part, part.engines).astype(np.int64),
    }


def _seen(part: RolloutBatch, values: NDArray[Any]) -> NDArray[Any]:
    """Return the different values at a mini-batch's response tokens, in ascending order."""
    sampled = values[part.response_mask]
    changed = np.flatnonzero(sampled[1:] != sampled[:-1]) + 1  # few; sorting all values takes far longer
    found: NDArray[Any] = np.unique(np.concatenate([sampled[:1], sampled[changed]]))
    return found


def pack_share(
    rollouts: RolloutBatch, part: range, batch: BatchConfig, layout: Layout
) -> tuple[list[MicroBatch], PackingEfficiency]:
    """Return this rank's rows of the sequences `part`, and how well all ranks' rows are packed."""
    lengths, multiple = rollouts.lengths[part.start : part.stop], layout.sequence_multiple
    trajectories = rollouts.trajectories[part.start : part.stop]
    ranks = assign_rows(
        padded_lengths(lengths, multiple),
        layout.data_size,
        batch.micro_batch_tokens,
        batch.oversized,
        multiple_of=layout.micro_batch_multiple,
        trajectories=trajectories,
    )
    micro_batches = pack(
        rollouts,
        [[part[index] for index in row] for row in ranks[layout.data_rank]],
        sequence_multiple=multiple,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )
    return micro_batches, packing_efficiency(lengths, ranks, multiple, split_trajectories(ranks, trajectories))


def packing_metrics(parts: Sequence[PackingEfficiency]) -> dict[str, float]:
    """Return the metrics of one step's mini-batches."""
    split = sum(part.split for part in parts)
    metrics = combine(
        {
            "useful_token_share": part.useful_share,
            "load_imbalance": part.imbalance,
            "micro_batches": part.micro_batches,
        }
        for part in parts
    )
    return metrics | ({"branches/split": split} if split else {})


def token_weights(
    response_lengths: NDArray[np.int64], weighting: str, normaliser: float | None = None
) -> NDArray[np.float64]:
    """Return the weight mu of each token of a trajectory, for B trajectories with so many response tokens T: float64
    [B]. `fibration.WEIGHTINGS` describes the kinds.

    seq-mean: 1/(B T); token-mean: 1/(sum of T); seq-sum: 1/B; constant: 1/(B L) with L = `normaliser`. Raises
    ValueError for another kind, and for "constant" without a positive `normaliser`.
    """
    count = len(response_lengths)
    if weighting == "seq-mean":
        return 1.0 / (count * response_lengths.astype(np.float64))
    if weighting == "constant" and (normaliser is None or normaliser <= 0):
        raise ValueError(f'weighting "constant" divides by a number of tokens; normaliser is {normaliser}')
    totals = {"token-mean": response_lengths.sum(), "seq-sum": count, "constant": count * (normaliser or 1)}
    if weighting not in totals:
        raise ValueError(f"weighting is {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
    return np.full(count, 1.0 / totals[weighting])
