"""This module knows what FP8 training needs of a machine; it is asked before anything starts."""

import importlib.util

import torch

_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Compute capability of the first GPUs that have a recipe: Ada, Hopper, Blackwell."""


def missing_for_fp8(recipe: str) -> str | None:
    """Return what this machine lacks, with the fix; None when FP8 can run."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible here; FP8 runs on GPUs only"
    if importlib.util.find_spec("transformer_engine") is None:
        return 'Transformer Engine is not installed; see README.md, "On GPUs"'
    found, needed = torch.cuda.get_device_capability(), _CAPABILITY[recipe]
    if found < needed:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, the {recipe} recipe needs "
            f"{needed[0]}.{needed[1]}"
        )
    return None
