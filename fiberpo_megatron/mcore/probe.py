"""A probe records hidden states of every layer and the routers' probabilities during a forward pass, for
comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import safetensors.torch as safetensors
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from fiberpo_megatron.mcore.model import PolicyModel
from fiberpo_megatron.mcore.parallel import exchange
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.types import MicroBatch


@dataclass
class Observation:
    """Holds what was seen of one micro-batch, on the CPU. Rows are positions of this rank's share, or tokens after
    `whole`."""

    layers: dict[int, Tensor] = field(default_factory=dict)
    """By global layer, from 0: the hidden states [rows, h] that it returns."""
    routers: dict[int, Tensor] = field(default_factory=dict)
    """By global layer: probabilities [rows, experts], zero for experts that were not chosen."""
    final: dict[int, Tensor] = field(default_factory=dict)
    """Under 0: hidden states after the final norm."""


@contextmanager
def observed(models: Sequence[PolicyModel]) -> Iterator[Observation]:
    """Record what the first micro-batch of the passes in this block computes on this rank."""
    seen = Observation()
    with ExitStack() as stack:
        for model in models:
            for layer in model.decoder.layers:
                assert isinstance(layer, TransformerLayer)
                number = layer.layer_number - 1
                stack.callback(layer.register_forward_hook(partial(_keep, seen.layers, number)).remove)
                if hasattr(layer.mlp, "router"):
                    hook = layer.mlp.router.register_forward_hook(partial(_keep, seen.routers, number))
                    stack.callback(hook.remove)
            if model.decoder.final_layernorm is not None:
                hook = model.decoder.final_layernorm.register_forward_hook(partial(_keep, seen.final, 0))
                stack.callback(hook.remove)
        yield seen


def _keep(target: dict[int, Tensor], key: int, module: Any, inputs: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    target.setdefault(key, first.detach().to("cpu", copy=True).flatten(0, -2))


_TABLES = ("layers", "routers", "final")


def whole(seen: Observation, batch: MicroBatch, layout: ParallelLayout, tokens: int) -> Observation:
    """Return the observations of all ranks by flat token index, [tokens, ...]; tokens in no row stay 0.

    Every rank calls this. `batch` is the micro-batch that this rank observed.
    """
    rows = batch.source_tokens.chunk(layout.tensor_size)[layout.tensor_rank]  # sequence parallelism
    tensors = {f"{name}.{key}": value for name in _TABLES for key, value in getattr(seen, name).items()}
    message = torch.frombuffer(bytearray(safetensors.save({"rows": rows.contiguous()} | tensors)), dtype=torch.uint8)
    out = Observation()
    for answer in exchange.all_gather_bytes(message, layout.host_group):
        part = safetensors.load(answer.numpy().tobytes())
        rows = part.pop("rows")
        for place, value in part.items():
            name, _, key = place.partition(".")
            _scatter(getattr(out, name), {int(key): value}, rows, tokens)
    return out


def _scatter(target: dict[int, Tensor], part: Mapping[int, Tensor], rows: Tensor, tokens: int) -> None:
    real = rows >= 0
    for key, value in part.items():
        table = target.setdefault(key, value.new_zeros(tokens, value.size(-1)))
        table[rows[real]] = value[real]
