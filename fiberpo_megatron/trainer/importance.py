"""This module weighs a training step's tokens by how likely the trainer finds them, compared with the engine that
sampled them, and watches that engines and trainer compute the same. docs/rollouts.md has the mathematics.

It runs once a step, between the pass of the old log-probs and the first optimiser step. All that comes later (the
objective, the terms, dumps and token records) sees the weights mu' w in the place of mu.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fiberpo_megatron.fibration import LevelBounds, importance_weights
from fiberpo_megatron.fibration.importance import ENGINE_KEY, VERSION_KEY
from fiberpo_megatron.fibration.levels import TRAJECTORY_KEY
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.telemetry.metrics import combine
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.batch import MiniBatch, token_weights
from fiberpo_megatron.trainer.drift import SamplingDrift, sampling_drift
from fiberpo_megatron.trainer.importance_settings import ImportanceConfig, Method, MismatchConfig
from fiberpo_megatron.types import RolloutBatch, TokenScores, concatenated_response_tokens
from fiberpo_megatron.user_warnings import warn_user


class EngineMismatch(RuntimeError):
    """Engines and trainer differ about the same weights by more than the run allows; the message names the engines."""


def trusting(engines: Sequence[int], why: str) -> None:
    """Let engines sample on."""


@dataclass(frozen=True)
class Weighing:
    """Says how the tokens of a training step are weighed."""

    step: int
    """Number of the training step, for messages."""
    method: Method
    """That of `algorithm.importance`, or what it stands for."""
    importance: ImportanceConfig
    mismatch: MismatchConfig
    weighting: str
    """How mu is made (`batch.token_weights`), with `normaliser`."""
    normaliser: float | None
    rollouts: RolloutBatch
    """The trajectories that are trained on, which messages name tokens of."""
    quarantine: Callable[[Sequence[int], str], None] = trusting
    """It is called with the engines whose tokens are masked and the reason, on ranks of the last pipeline stage."""


def weighed(
    layout: Layout, parts: Sequence[MiniBatch], scores: Sequence[TokenScores | None], how: Weighing | None
) -> tuple[list[MiniBatch], dict[str, float]]:
    """Return the mini-batches with the weights mu' w of their tokens, and metrics over all ranks.

    mu' is mu counted again without masked tokens: over the trajectories that still have a token with w > 0, and these
    tokens. Where nothing is weighed or masked the mini-batches come back as they are. Without `how` (a caller that only
    optimises) there are only the metrics of drift.

    Every rank calls it; scores are the trainer's before the first optimiser step, None on ranks that are not on the
    last pipeline stage, which get no metrics. Raises EngineMismatch where the limits of `how.mismatch` say so; all
    ranks then raise.
    """
    with together(layout, "comparing engines and trainer"):
        drift = sampling_drift(layout, parts, scores)
        if drift is None:
            return list(parts), {}
        known = [found for found in scores if found is not None]
        metrics = drift.metrics()
        masked: list[int] = []
        if how is not None:
            masked = _engines_to_mask(layout, parts, known, drift, how)
            if how.mismatch.mask > 0:
                metrics["mismatch/masked_engines"] = float(len(masked))
        if how is None or (how.method == "off" and not masked):
            return list(parts), metrics
        found = [_weighed(layout, part, one.log_probs, how, masked) for part, one in zip(parts, known, strict=True)]
        return [part for part, _ in found], metrics | combine(record for _, record in found)


def _weighed(
    layout: Layout, part: MiniBatch, old_log_probs: Tensor, how: Weighing, engines: Sequence[int]
) -> tuple[MiniBatch, dict[str, float]]:
    """Return one mini-batch with its weights, and the metrics of the weights; tokens of `engines` get weight 0."""
    numbers, settings = part.labels[ENGINE_KEY], how.importance
    masked = torch.isin(numbers, torch.tensor(engines, dtype=numbers.dtype))[part.keys[ENGINE_KEY].cpu()]
    used = (TRAJECTORY_KEY, VERSION_KEY, ENGINE_KEY)
    found = importance_weights(
        old_log_probs.double() - part.rollout_log_probs.to(old_log_probs.device).double(),
        how.method,
        cap=settings.cap,
        low=settings.low,
        high=settings.high,
        keys={key: part.keys[key] for key in used},
        counts=part.counts,
        labels=part.labels,
        levels=LevelBounds(**settings.levels.model_dump()),
        masked=masked if len(engines) else None,
        reduce=layout.sum_over_tokens,
    )
    assert found.kept is not None, "every mini-batch has the key trajectory"
    w = found.weights.to(part.weights.device)
    mu = _renormalised(found.kept, how.weighting, how.normaliser).to(part.weights.device)
    return replace(part, weights=mu[part.keys[TRAJECTORY_KEY]] * w, importance=w), found.metrics


def _renormalised(kept: Tensor, weighting: str, normaliser: float | None) -> Tensor:
    """Return mu' of each trajectory's tokens, float64 [trajectories], from how many of its tokens have a weight: 0 for
    a trajectory without any, and for all of them where nothing is left."""
    lengths = kept.cpu().numpy()
    mu = np.zeros(len(lengths))
    if (lengths > 0).any():
        mu[lengths > 0] = token_weights(lengths[lengths > 0], weighting, normaliser)
    return torch.from_numpy(mu)


def _engines_to_mask(
    layout: Layout, parts: Sequence[MiniBatch], scores: Sequence[TokenScores], drift: SamplingDrift, how: Weighing
) -> list[int]:
    """Return the engines that are above the limit that masks, after one warning for each engine above a limit."""
    limits, found = how.mismatch, drift.mismatch()

    def above(limit: float) -> list[int]:
        return [engine for engine, (mean, _) in found.items() if limit > 0 and mean > limit]

    masked, stopping = above(limits.mask), above(limits.stop)
    noted = sorted({*above(limits.warn), *masked, *stopping})
    if not noted:
        return []
    texts = dict(zip(noted, _described(layout, parts, scores, drift, how, noted), strict=True))
    fixes = (
        "compare what the engines serve with the trainer (precision, kernels, weights, routing of experts: "
        'algorithm.routing_replay = "rollout"), or raise the limit'
    )
    if stopping:
        said = "; ".join(texts[engine] for engine in stopping)
        raise EngineMismatch(f"{said}: above algorithm.mismatch.stop = {limits.stop:g} nats; {fixes}")
    if masked and not {engine for engine, _ in drift.cells}.difference(masked):
        said = "; ".join(texts.values())
        raise EngineMismatch(
            f"{said}: every engine is above algorithm.mismatch.mask = {limits.mask:g} nats, so that no token is left "
            f"to train on; {fixes}"
        )
    for engine in noted if layout.is_logger else ():
        name, value = ("mask", limits.mask) if engine in masked else ("warn", limits.warn)
        what = "; all of its tokens of this step have weight 0, and it samples no more" if engine in masked else ""
        warn_user(f"{texts[engine]}: above algorithm.mismatch.{name} = {value:g} nats{what}; {fixes}")
    if masked:
        how.quarantine(masked, "; ".join(texts[engine] for engine in masked))
    return masked


def _described(
    layout: Layout,
    parts: Sequence[MiniBatch],
    scores: Sequence[TokenScores],
    drift: SamplingDrift,
    how: Weighing,
    engines: Sequence[int],
) -> Iterator[str]:
    """Yield for each engine a text with its figure and its worst token; equal on all ranks, in two reductions."""
    device = scores[0].log_probs.device
    largest = torch.full((len(engines),), -1.0, dtype=torch.float64, device=device)
    places = torch.full((len(engines),), -1.0, dtype=torch.float64, device=device)
    for part, one in zip(parts, scores, strict=True):
        number = part.labels[ENGINE_KEY][part.keys[ENGINE_KEY].cpu()]
        fresh = part.labels[VERSION_KEY][part.keys[VERSION_KEY].cpu()] == 0
        y = (one.log_probs.cpu() - part.rollout_log_probs.cpu()).abs().double()
        index = concatenated_response_tokens(part.micro_batches).cpu()
        for at, engine in enumerate(engines):
            own = ((number == engine) & fresh).nonzero().squeeze(1)
            if len(own) and float(y[own].max()) > float(largest[at]):
                worst = own[y[own].argmax()]
                largest[at], places[at] = y[worst], float(index[worst])
    most = layout.max_over_tokens(largest)
    places = layout.max_over_tokens(torch.where(largest == most, places, torch.full_like(places, -1.0)))
    for engine, value, place in zip(engines, most.tolist(), places.tolist(), strict=True):
        mean, tokens = drift.mismatch()[engine]
        yield (
            f"step {how.step}: engine {engine} and the trainer differ by {mean:.3g} nats a token, the mean |log pi_old "
            f"- log mu| of the {tokens} tokens that it sampled with the trainer's weights, most ({value:.3g}) at "
            f"{_token(how.rollouts, int(place))}"
        )


def _token(rollouts: RolloutBatch, flat: int) -> str:
    """Return which token of which trajectory stands at a flat index."""
    sequence = int(np.searchsorted(rollouts.offsets, flat, side="right")) - 1
    trajectory = int(rollouts.trajectories[sequence])
    begin = int(rollouts.offsets[np.searchsorted(rollouts.trajectories, trajectory)])
    place = int(rollouts.response_mask[begin:flat].sum())
    return f"response token {place} of trajectory {trajectory} (token id {int(rollouts.tokens[flat])})"
