"""This module runs `fiberpo check-model`: it compares our log-probs of a prompt with transformers', without GPUs.

The command runs transformers first (`transformers_reference.py`), then starts the ranks, which compare.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fiberpo_megatron.config import Config
from fiberpo_megatron.data.packing import pack
from fiberpo_megatron.mcore.families import read_architecture, read_hf_config, used_fields
from fiberpo_megatron.mcore.model import build_model
from fiberpo_megatron.mcore.parallel.layout import start_layout, stop_layout
from fiberpo_megatron.mcore.probe import Observation, observed, whole
from fiberpo_megatron.mcore.schedule import Schedule
from fiberpo_megatron.mcore.weights import load_hf
from fiberpo_megatron.trainer import transformers_reference as reference
from fiberpo_megatron.types import RolloutBatch

DIVERGED = 1e-3
"""A layer is named when its hidden states are off by more than this share of the largest, or an expert differs."""


def compare(config: Config) -> None:
    """Build the model on every rank, run the prompt and print the differences. ValueError where they are too large."""
    job = reference.read_job(config.run.folder)
    hf_config = read_hf_config(config.model.path, config.model.family)
    layout = start_layout(hf_config, config.parallel, config.run)
    try:
        chunks = build_model(read_architecture(hf_config), config.model, layout)
        load_hf(chunks, hf_config, config.model.path, layout)
        tokens = job.expected.tokens
        (batch,) = pack(_one_trajectory(tokens), [[0]], sequence_multiple=layout.sequence_multiple)
        schedule = Schedule(chunks, chunks, layout, config.model.log_prob_chunk_tokens)
        with observed(chunks) as seen:
            scores = schedule.forward([batch], 1.0)
        inside = whole(seen, batch, layout, len(tokens))
        error = None
        if layout.is_logger:
            text, error = _verdict(job, hf_config, scores[0].log_probs.cpu(), inside)
            print(text, flush=True)
            if error:
                reference.leave_disagreement(config.run.folder)
        layout.agree(error, "check-model", raises=ValueError)
    finally:
        stop_layout()


def _one_trajectory(tokens: Tensor) -> RolloutBatch:
    count = len(tokens)
    return RolloutBatch.filled(
        tokens=tokens.numpy(), response_mask=np.arange(count) > 0, lengths=np.array([count]), groups=np.zeros(1)
    )


def _verdict(
    job: reference.Job, hf_config: Mapping[str, Any], log_probs: Tensor, seen: Observation
) -> tuple[str, str | None]:
    """The table, and what is wrong (None: nothing)."""
    expected = job.expected
    wanted = expected.logits.log_softmax(-1)[:-1].gather(-1, expected.tokens[1:, None])[:, 0]
    difference = (log_probs - wanted).abs()
    worst = int(difference.argmax())
    columns = f"{'layer':>10}  {'hidden states off by (share of the largest)':>44}"
    lines = [
        "config.json, fields used:",
        *(f"  {key} = {value!r}" for key, value in used_fields(hf_config).items()),
        "",
        f"{columns}  tokens sent to other experts" if seen.routers else columns,
    ]
    first = None
    for layer in sorted(seen.layers):
        off, rerouted = _layer(expected, seen, layer)
        mark = ""
        if first is None and (off > DIVERGED or rerouted):
            first, mark = layer, "  <- first to differ"
        routed = f"  {rerouted if layer in seen.routers else '-':>28}" if seen.routers else ""
        lines.append(f"{layer:>10}  {off:>44.1e}{routed}{mark}")
    lines += [
        "",
        f"log-probs of {len(wanted)} tokens: largest difference {difference.max():.1e} at position {worst + 1} "
        f"({job.words[worst + 1]!r}: {log_probs[worst]:.4f}, transformers {wanted[worst]:.4f}), "
        f"mean {difference.mean():.1e}, tolerance {job.tolerance:.0e}",
    ]
    if float(difference.max()) <= job.tolerance:  # a NaN is no agreement
        return "\n".join([*lines, "The model computes what transformers computes."]), None
    where = "after the last layer (norm or output weights)" if first is None else f"in layer {first}"
    return "\n".join(lines), (
        f"log-probs differ from transformers' by up to {difference.max():.1e} (tolerance {job.tolerance:.0e}), first "
        f"{where}; do not train this model: compare that layer's fields of config.json with the model's own code. In "
        "bfloat16 differences of 1e-2 are rounding: check in float32 (the default), or raise --tolerance"
    )


def _layer(expected: reference.Reference, seen: Observation, layer: int) -> tuple[float, int]:
    """(largest difference of hidden states over the largest value, tokens whose experts differ); inputs only."""
    wanted, found = expected.layers[layer][:-1], seen.layers[layer][:-1].float()
    off = float((found - wanted).abs().max() / wanted.abs().max())
    if layer not in seen.routers:
        return off, 0
    chosen = (seen.routers[layer][:-1] > 0) != (expected.routers[layer][:-1] > 0)
    return off, int(chosen.any(-1).sum())
