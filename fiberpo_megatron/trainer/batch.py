"""From scored groups to the mini-batches of the optimiser: flat arrays, then packed rows with token weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.data.packing import PackingEfficiency, assign_rows, pack, packing_efficiency, padded_lengths
from fiberpo_megatron.telemetry.metrics import combine
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.types import (
    Layout,
    MicroBatch,
    RolloutBatch,
    RolloutGroup,
    Trajectory,
    concatenated_response_tokens,
)


@dataclass(frozen=True)
class MiniBatch:
    """One optimiser step's trajectories as this rank holds them; n local response tokens."""

    micro_batches: list[MicroBatch]
    packing: PackingEfficiency
    advantages: Tensor
    """float32 [n]"""
    weights: Tensor
    """float64 [n] mu: positive, summing to 1 over the mini-batch, over all ranks."""
    keys: dict[str, Tensor]
    """int64 [n] per key (trajectory, prompt_group, domain): dense ids inside the mini-batch."""
    counts: dict[str, int]
    """Number of ids of each key over all ranks."""
    rollout_log_probs: Tensor
    """float32 [n]"""
    expert_share: Tensor | None = None
    """float64 [n, P] omega: share of each token's routed (layer, slot) pairs in each expert partition."""


def flatten(groups: Sequence[RolloutGroup]) -> RolloutBatch:
    """Flat arrays of a leader's groups, numbered from 0."""
    trajectories = [t for group in groups for t in group.trajectories]
    ids = [g for g, group in enumerate(groups) for _ in group.trajectories]

    def joined(parts: list[NDArray], dtype: type) -> NDArray:
        return np.concatenate([*parts, np.zeros(0)]).astype(dtype)

    return RolloutBatch(
        tokens=joined([np.array([*t.prompt.token_ids, *t.completion.token_ids]) for t in trajectories], np.int64),
        response_mask=joined([_response_mask(t) for t in trajectories], np.bool_),
        rollout_log_probs=joined(
            [np.concatenate([np.zeros(len(t.prompt.token_ids)), t.completion.log_probs]) for t in trajectories],
            np.float32,
        ),
        lengths=np.array([len(t.prompt.token_ids) + len(t.completion.token_ids) for t in trajectories], np.int64),
        rewards=np.array([t.reward for t in trajectories], np.float32),
        correct=np.array([t.correct for t in trajectories], np.bool_),
        groups=np.array(ids, np.int64),
        domains=np.array([t.prompt.domain for t in trajectories], np.int64),
        truncated=np.array([t.completion.finish_reason == "length" for t in trajectories], np.bool_),
        routed_experts=_routed_experts(trajectories),
    )


def _routed_experts(trajectories: Sequence[Trajectory]) -> NDArray[np.int16]:
    """[N, MoE layers, top_k], -1 for the last token of each trajectory; empty when the engine was not asked."""
    rows: list[NDArray[np.int16]] = []
    for trajectory in trajectories:
        experts = trajectory.completion.routed_experts
        if experts is None:
            return np.zeros((0, 0, 0), np.int16)
        rows += [experts.astype(np.int16), np.full((1, *experts.shape[1:]), -1, np.int16)]
    return np.concatenate(rows) if rows else np.zeros((0, 0, 0), np.int16)


def _response_mask(trajectory: Trajectory) -> NDArray[np.bool_]:
    completion = trajectory.completion
    sampled = np.ones(len(completion.token_ids), np.bool_) if completion.loss_mask is None else completion.loss_mask
    return np.concatenate([np.zeros(len(trajectory.prompt.token_ids), np.bool_), sampled])


def mini_batches(
    rollouts: RolloutBatch,
    advantages: NDArray[np.float32],
    *,
    batch: BatchConfig,
    weighting: str,
    domains: int,
    layout: Layout,
) -> list[MiniBatch]:
    """Cut at group boundaries into `batch.mini_batches` parts and pack this rank's share of each.

    Which trajectories form a part does not depend on the layout. `advantages` is [B], `domains` the number of
    domains.
    """
    edges = np.searchsorted(
        rollouts.groups, np.linspace(0, rollouts.groups[-1] + 1, batch.mini_batches + 1).round().astype(int)
    )
    return [
        _mini_batch(rollouts, advantages, int(first), int(last), batch, weighting, domains, layout)
        for first, last in zip(edges[:-1], edges[1:])
    ]


def _mini_batch(
    rollouts: RolloutBatch,
    advantages: NDArray[np.float32],
    first: int,
    last: int,
    batch: BatchConfig,
    weighting: str,
    domains: int,
    layout: Layout,
) -> MiniBatch:
    micro_batches, efficiency = pack_share(rollouts, range(first, last), batch, layout)
    tokens = concatenated_response_tokens(micro_batches).numpy()
    trajectory = np.searchsorted(rollouts.offsets, tokens, side="right") - 1
    weights = token_weights(rollouts.response_lengths[first:last], weighting)
    group = rollouts.groups - rollouts.groups[first]
    return MiniBatch(
        micro_batches=micro_batches,
        packing=efficiency,
        advantages=torch.from_numpy(advantages[trajectory]),
        weights=torch.from_numpy(weights[trajectory - first]),
        keys={
            "trajectory": torch.from_numpy(trajectory - first),
            "prompt_group": torch.from_numpy(group[trajectory]),
            "domain": torch.from_numpy(rollouts.domains[trajectory]),
        },
        counts={"trajectory": last - first, "prompt_group": int(group[last - 1]) + 1, "domain": domains},
        rollout_log_probs=torch.from_numpy(rollouts.rollout_log_probs[tokens]),
    )


def pack_share(
    rollouts: RolloutBatch, part: range, batch: BatchConfig, layout: Layout
) -> tuple[list[MicroBatch], PackingEfficiency]:
    """This rank's rows of the trajectories `part`, and how well all ranks' rows are packed."""
    lengths, multiple = rollouts.lengths[part.start : part.stop], layout.sequence_multiple
    ranks = assign_rows(
        padded_lengths(lengths, multiple),
        layout.data_size,
        batch.micro_batch_tokens,
        batch.oversized,
        multiple_of=layout.micro_batch_multiple,
    )
    micro_batches = pack(
        rollouts,
        [[part[index] for index in row] for row in ranks[layout.data_rank]],
        sequence_multiple=multiple,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )
    return micro_batches, packing_efficiency(lengths, ranks, multiple)


def packing_metrics(parts: Sequence[PackingEfficiency]) -> dict[str, float]:
    """Of one step's mini-batches."""
    return combine(
        {
            "useful_token_share": part.useful_share,
            "load_imbalance": part.imbalance,
            "micro_batches": part.micro_batches,
        }
        for part in parts
    )


def token_weights(response_lengths: NDArray[np.int64], weighting: str) -> NDArray[np.float64]:
    """[B] mu of each token of a trajectory. seq-mean: 1/(B T); token-mean: 1/(sum of T)."""
    if weighting == "seq-mean":
        return 1.0 / (len(response_lengths) * response_lengths.astype(np.float64))
    return np.full(len(response_lengths), 1.0 / response_lengths.sum())
