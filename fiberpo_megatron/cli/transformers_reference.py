"""What transformers computes for a model folder: the reference of `fiberpo check-model`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Reference:
    """Of one sequence of L tokens, float32 on the CPU."""

    tokens: Tensor
    """int64 [L]"""
    logits: Tensor
    """[L, vocabulary]"""
    layers: dict[int, Tensor]
    """By layer, from 0: hidden states [L, h] that it hands on."""
    routers: dict[int, Tensor]
    """By layer: probabilities [L, experts], zero for experts that were not chosen."""


def load_model(folder: Path) -> Any:
    """The model in float32 and its plainest implementation."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def prompt_tokens(folder: Path, text: str) -> Tensor:
    """int64 [L] of a text under the folder's tokenizer."""
    from transformers import AutoTokenizer

    return torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"], dtype=torch.int64)


@torch.no_grad()
def run(model: Any, tokens: Tensor) -> Reference:
    """One forward pass over `tokens` [L]."""
    layers: dict[int, Tensor] = {}
    routers: dict[int, Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(partial(_keep_layer, layers, number)))
        router = getattr(layer.mlp, "gate", None)
        if router is not None:
            hooks.append(router.register_forward_hook(partial(_keep_router, routers, number)))
    try:
        logits = model(input_ids=tokens[None]).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return Reference(tokens, logits, layers, routers)


def _keep_layer(target: dict[int, Tensor], layer: int, module: Any, inputs: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    target[layer] = hidden.view(-1, hidden.size(-1)).clone()


def _keep_router(target: dict[int, Tensor], layer: int, module: Any, inputs: Any, output: Any) -> None:
    logits, weights, chosen = output
    target[layer] = torch.zeros_like(logits, dtype=torch.float32).scatter(1, chosen, weights.float())
