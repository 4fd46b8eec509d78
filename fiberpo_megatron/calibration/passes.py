"""This module times the trainer's real work on a few layers of a model: passes, the optimizer, exports and saves."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch

from fiberpo_megatron.calibration.gate import objective_gate
from fiberpo_megatron.calibration.timing import timed
from fiberpo_megatron.config import Config
from fiberpo_megatron.data.packing import pack
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.model import build_model, draw_weights
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.mcore.policy import MegatronPolicy
from fiberpo_megatron.types import MicroBatch, RolloutBatch

LAYERS = (1, 3)
"""Layers of the two models that are timed: a layer costs their difference, and the rest is what a pass itself costs."""


@dataclass(frozen=True)
class PassTimes:
    """Holds the seconds of passes over one micro-batch of every data-parallel rank, one number per round."""

    layers: int
    tokens: int
    """Positions of the micro-batch on all its context-parallel ranks."""
    length: int
    """Tokens of each of its sequences."""
    forward: list[float]
    """Log-probs without gradient."""
    train: list[float]
    """The objective's gates, a forward and a backward pass, and the sum of the gradients over the ranks."""


@dataclass(frozen=True)
class ModelTimes:
    """Holds what a model of so many layers costs beside its passes, in seconds, one number per round."""

    layers: int
    optimizer: list[float]
    """The optimizer's step on gradients that are there, and the check of them."""
    export: list[float]
    """Full tensors under Hugging Face names on rank 0."""
    save: list[float]
    """A checkpoint, until it is complete."""


def shortened(hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return config.json's values for so many layers, all of them with experts where the model has any."""
    dense: dict[str, Any] = {"first_k_dense_replace": 0} if "first_k_dense_replace" in hf_config else {}
    dense |= {"mlp_only_layers": []} if "mlp_only_layers" in hf_config else {}
    return {**hf_config, **dense, "num_hidden_layers": layers}


def micro_batch(vocabulary: int, layout: ParallelLayout, tokens: int, length: int) -> MicroBatch:
    """Return one packed row of about `tokens` positions: sequences of `length` inputs whose tokens are random."""
    count = max(1, tokens // length)
    lengths = np.full(count, length + 1)
    begins = np.zeros(lengths.sum(), bool)
    begins[np.cumsum(lengths) - lengths] = True
    batch = RolloutBatch.filled(
        tokens=np.random.default_rng(layout.data_rank).integers(0, vocabulary, len(begins)),
        response_mask=~begins,
        lengths=lengths,
        groups=np.zeros(count),
    )
    (packed,) = pack(
        batch,
        [list(range(count))],
        sequence_multiple=layout.sequence_multiple,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )
    return packed


def time_passes(
    config: Config,
    hf_config: Mapping[str, Any],
    layout: ParallelLayout,
    tokens: Sequence[int],
    length: int,
    folder: Path,
) -> tuple[list[PassTimes], list[ModelTimes]]:
    """Return the times of models of LAYERS layers on micro-batches of each of `tokens` sizes; every rank calls this.

    Checkpoints are written to `folder`, which all ranks see, and removed.
    """
    policies = {layers: _policy(config, shortened(hf_config, layers), layout) for layers in LAYERS}
    works: dict[tuple[str, int, int], Callable[[], object]] = {}
    positions = {}
    for layers, policy in policies.items():
        for size in tokens:
            batches = [micro_batch(int(hf_config["vocab_size"]), layout, size, length)]
            positions[size] = len(batches[0].tokens) * layout.context_size
            known = policy.log_probs(batches, 1.0)
            log_probs = known.log_probs if known else torch.zeros(0)
            gate = objective_gate(config, layout, batches[0], length, log_probs)
            works["forward", layers, size] = partial(policy.log_probs, batches, 1.0)
            works["train", layers, size] = partial(policy.accumulate, batches, gate, 1.0, log_probs=log_probs)
        works["optimizer", layers, 0] = partial(_optimizer_step, policy)
        works["export", layers, 0] = partial(_export, policy)
        works["save", layers, 0] = partial(policy.save, str(folder), {"step": 0})
    found = timed(works, layout.device, partial(_without, folder, layout))
    _without(folder, layout)
    passes = [
        PassTimes(layers, positions[size], length, found["forward", layers, size], found["train", layers, size])
        for layers in LAYERS
        for size in tokens
    ]
    return passes, [ModelTimes(n, *(found[what, n, 0] for what in ("optimizer", "export", "save"))) for n in LAYERS]


def _policy(config: Config, hf_config: Mapping[str, Any], layout: ParallelLayout) -> MegatronPolicy:
    architecture = read_architecture(hf_config)
    models = build_model(architecture, config.model, layout)
    draw_weights(models, architecture, config.run.seed)
    return MegatronPolicy(models, hf_config, layout, config, 1000)


def _optimizer_step(policy: MegatronPolicy) -> None:
    """Do what follows the gradients in a step: look whether they are finite, on every rank, and update the weights."""
    policy.layout.agree(None, "a timed step")
    policy.layout.any_rank(not math.isfinite(policy.optimizer.begin_step()))
    policy.optimizer.step()


def _export(policy: MegatronPolicy) -> None:
    for _ in policy.weights.full():
        pass


def _without(folder: Path, layout: ParallelLayout) -> None:
    """Remove the checkpoint, and wait for the other ranks."""
    if layout.rank == 0:
        rmtree(folder, ignore_errors=True)
    layout.barrier()
