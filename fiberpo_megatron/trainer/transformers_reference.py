"""This module computes what transformers says about a model folder: the reference of `fiberpo check-model`."""

import json
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.data.tokenizer import load_tokenizer
from fiberpo_megatron.mcore.parallel.checks import check_layout


@dataclass
class Reference:
    """This is what transformers says about one sequence of L tokens, in float32 on the CPU."""

    tokens: Tensor
    """int64 [L]"""
    logits: Tensor
    """[L, vocabulary]"""
    layers: dict[int, Tensor]
    """By layer, from 0: hidden states [L, h] that it hands on."""
    routers: dict[int, Tensor]
    """By layer: probabilities [L, experts], zero for experts that were not chosen."""


@dataclass
class Job:
    """This is what the ranks compare with."""

    expected: Reference
    words: list[str]
    """Readable tokens."""
    tolerance: float


DEFAULT_PROMPT = "Mix 3 eggs with 200 g of flour, then bake the cake for 45 minutes at 180 degrees."
_JOB = "check.pickle"
_DISAGREES = "disagrees"


def prepare(config: Config, prompt: str | None, tolerance: float) -> None:
    """Run transformers on the prompt and leave the job in `run.folder`. Raises ConfigError, ValueError."""
    folder = config.model.path
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; name a Hugging Face model folder")
    if config.parallel.context > 1:
        raise ConfigError(
            f"parallel.context = {config.parallel.context}: check-model compares one short prompt, which is not cut; "
            "leave it at 1"
        )
    hf_config = json.loads((folder / "config.json").read_text())
    check_layout(hf_config, config.parallel, config.parallel.world_size())
    tokens, words = prompt_tokens(folder, prompt or DEFAULT_PROMPT)
    if len(tokens) < 2:
        raise ConfigError(f"--prompt {prompt!r} is {len(tokens)} token(s) long; at least 2 are needed")
    job = Job(run(load_model(folder), tokens), words, tolerance)
    config.run.folder.mkdir(parents=True, exist_ok=True)
    (config.run.folder / _JOB).write_bytes(pickle.dumps(job))


def read_job(folder: Path) -> Job:
    """Return what `prepare` left."""
    job: Job = pickle.loads((folder / _JOB).read_bytes())
    return job


def leave_disagreement(folder: Path) -> None:
    """Say that the comparison was made, and failed: ranks that fail otherwise leave nothing."""
    (folder / _DISAGREES).touch()


def disagrees(folder: Path) -> bool:
    """Return whether the ranks left a disagreement."""
    return (folder / _DISAGREES).exists()


def load_model(folder: Path) -> Any:
    """Return the model in float32 and its plainest implementation."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def prompt_tokens(folder: Path, text: str) -> tuple[Tensor, list[str]]:
    """Return int64 [L], the tokens of a text under the folder's tokenizer, and each token as text."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    return torch.tensor(ids, dtype=torch.int64), [tokenizer.decode([token]) for token in ids]


@torch.no_grad()
def run(model: Any, tokens: Tensor) -> Reference:
    """Run one forward pass over `tokens` [L]."""
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
