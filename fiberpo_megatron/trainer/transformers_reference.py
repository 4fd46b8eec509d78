"""This module computes what transformers says about a model folder: the reference of `fiberpo check-model`."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.data.tokenizer import load_tokenizer
from fiberpo_megatron.mcore.families import read_hf_config
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
_JOB = "check.npz"
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
    check_layout(read_hf_config(folder, config.model.family), config.parallel, config.parallel.world_size())
    tokens, words = prompt_tokens(folder, prompt or DEFAULT_PROMPT)
    if len(tokens) < 2:
        raise ConfigError(f"--prompt {prompt!r} is {len(tokens)} token(s) long; at least 2 are needed")
    job = Job(run(load_model(folder), tokens), words, tolerance)
    write_job(job, config.run.folder)


def write_job(job: Job, folder: Path) -> None:
    """Write what the ranks compare with, as plain arrays: reading them cannot run code, whoever wrote them."""
    expected = job.expected
    described = json.dumps({"words": job.words, "tolerance": job.tolerance})
    arrays = {"tokens": expected.tokens, "logits": expected.logits}
    arrays |= {f"layers/{layer}": hidden for layer, hidden in expected.layers.items()}
    arrays |= {f"routers/{layer}": chosen for layer, chosen in expected.routers.items()}
    named = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(folder / _JOB, allow_pickle=False, described=np.array(described), **named)


def read_job(folder: Path) -> Job:
    """Return what `write_job` wrote into a folder."""
    with np.load(folder / _JOB, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    described = json.loads(str(arrays.pop("described")))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def by_layer(kind: str) -> dict[int, Tensor]:
        parts = ((name.partition("/"), tensor) for name, tensor in tensors.items())
        return {int(layer): tensor for (found, _, layer), tensor in parts if found == kind}

    expected = Reference(tensors["tokens"], tensors["logits"], by_layer("layers"), by_layer("routers"))
    return Job(expected, described["words"], described["tolerance"])


def leave_disagreement(folder: Path) -> None:
    """Say that the comparison was made, and failed: ranks that fail otherwise leave nothing."""
    (folder / _DISAGREES).touch()


def disagrees(folder: Path) -> bool:
    """Return whether the ranks left a disagreement."""
    return (folder / _DISAGREES).exists()


def load_model(folder: Path) -> Any:
    """Return the model in float32 and its plainest implementation, without running code from the folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    options |= {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
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
