"""This module is the supervised warm-up with the RL policy's own code: coefficients are 1/tokens."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fiberpo_megatron.config import Config
from fiberpo_megatron.data.encoding import Example
from fiberpo_megatron.interfaces import Checkpoints, Policy, Recorder
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.batch import pack_share, packing_metrics
from fiberpo_megatron.trainer.stop import Stopped, never
from fiberpo_megatron.types import Coefficients, RolloutBatch, flatten

Examples = Callable[[int, int, int], RolloutBatch]
"""(seed, step, count) -> the step's examples as trajectories, equal on every rank."""


def supervised_batch(examples: Sequence[Example]) -> RolloutBatch:
    """Return the examples as trajectories whose response is the target."""
    if not examples:
        return flatten([])
    prompts = [example.prompt.token_ids for example in examples]
    targets = [example.target_ids for example in examples]
    return RolloutBatch.filled(
        tokens=np.concatenate([np.array([*p, *t]) for p, t in zip(prompts, targets)]),
        response_mask=np.concatenate([[False] * len(p) + [True] * len(t) for p, t in zip(prompts, targets)]),
        lengths=np.array([len(p) + len(t) for p, t in zip(prompts, targets)]),
        groups=np.arange(len(examples)),
    )


def fine_tune(
    config: Config,
    policy: Policy,
    examples: Examples,
    recorder: Recorder,
    checkpoints: Checkpoints,
    timers: PhaseTimers,
    start: int = 0,
    stop: Callable[[], bool] = never,
) -> None:
    """Maximise the mean log-prob of the target tokens for `sft.steps` optimiser steps.

    Raises Stopped, after saving, when any rank was asked to stop.
    """
    for step in range(start, config.sft.steps):
        batch = examples(config.run.seed, step, config.sft.examples)
        metrics = _step(config, policy, batch)
        seconds = timers.read()
        metrics["tokens_per_second"] = len(batch.tokens) / seconds["seconds/total"]
        recorder.record("sft", step, metrics | seconds)
        done, every = step + 1, config.checkpoint.every_steps
        stopping = policy.layout.any_rank(stop())
        if stopping or done == config.sft.steps or (every and done % every == 0):
            checkpoints.save(policy, done, prompts={}, measured={})
        checkpoints.complete(wait=stopping or done == config.sft.steps)
        if stopping and done < config.sft.steps:
            raise Stopped(done)


def _step(config: Config, policy: Policy, batch: RolloutBatch) -> dict[str, float]:
    layout = policy.layout
    micro_batches, packing = pack_share(batch, range(len(batch.lengths)), config.batch, layout)
    targets = int(batch.response_mask.sum())
    losses: list[Tensor] = []

    def gate(log_probs: Tensor, part: slice) -> Coefficients:
        losses.append(-log_probs.double().sum() / targets)
        return Coefficients(torch.full_like(log_probs, 1.0 / targets))

    outcome = policy.step(micro_batches, gate, temperature=1.0, single_pass=True)
    metrics = {
        "gradient_norm": outcome.gradient_norm,
        "learning_rate": outcome.learning_rate,
        **packing_metrics([packing]),
    }
    if layout.is_last_stage:
        metrics["loss"] = layout.sum_over_tokens(torch.stack(losses).sum().reshape(1)).item()
    return metrics
