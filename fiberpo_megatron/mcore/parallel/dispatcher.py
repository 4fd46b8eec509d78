"""This module checks `parallel.moe_dispatcher`, the way in which tokens travel to the ranks of their experts."""

from importlib.util import find_spec
from typing import Any

import torch

from fiberpo_megatron.mcore.families import Architecture
from fiberpo_megatron.mcore.settings import ParallelConfig


def check_dispatcher(architecture: Architecture, parallel: ParallelConfig, here: bool = True) -> None:
    """Refuse DeepEP's dispatcher where it cannot run: for this model or, if the run is `here`, on this machine.

    Raises ValueError with the cause and the other choice.
    """
    if parallel.moe_dispatcher != "flex":
        return
    problem = None
    if architecture.experts is None:
        problem = f"a {architecture.model_type} model has no experts"
    elif parallel.tensor * parallel.expert == 1:
        problem = "with parallel.tensor = 1 and parallel.expert = 1 no token travels"
    elif here and not torch.cuda.is_available():
        problem = "DeepEP needs a GPU, and this machine has none"
    elif here and find_spec("deep_ep") is None:
        problem = (
            "the package deep_ep cannot be imported; install DeepEP (https://github.com/deepseek-ai/DeepEP) on every "
            "node that trains"
        )
    if problem is not None:
        raise ValueError(f'parallel.moe_dispatcher = "flex": {problem}, or set moe_dispatcher = "alltoall"')


def dispatcher_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig; dense models need them too, because the default refuses
    sequences of different lengths."""
    if parallel.moe_dispatcher == "flex":
        return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    return {"moe_token_dispatcher_type": "alltoall"}
