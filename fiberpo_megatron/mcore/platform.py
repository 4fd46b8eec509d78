"""There are two platforms and one code: this module alone answers what differs between a GPU and a CPU run."""

import os
import warnings
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fiberpo_megatron.mcore.cudnn import prefer_torch_cudnn
from fiberpo_megatron.subprocesses import set_gpu_variables


class Platform(Protocol):
    """Declares what the rest of the package asks about the machine."""

    name: str
    backend: str
    """torch.distributed backend of the model's groups: nccl or gloo."""
    device: torch.device

    def transformer_options(self) -> dict[str, Any]:
        """Return the fields of Megatron's TransformerConfig that depend on the machine."""
        ...

    def layer_spec(self, *, num_experts: int | None, qk_layernorm: bool, latent: bool) -> Any:
        """Return the ModuleSpec of one transformer layer, dense when `num_experts` is None.

        It has multi-head latent attention when `latent` is set.
        """
        ...

    def final_norm(self) -> Any:
        """Return the module of the norm after the last layer."""
        ...

    def packed_sequences(self, cu_seqlens: Tensor, max_seqlen: int, context_rank: int, context_size: int) -> Any:
        """Return Megatron's description of a packed row; `cu_seqlens` is int32 [S + 1] before the context-parallel
        cut."""
        ...


_HARMLESS_WARNINGS = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.[a-z_]*` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead and we are deprecating ShardedTensor",
)
"""Warnings that Megatron-Core prints on every start and that have no consequence here."""


def prepare() -> None:
    """Set what must be set before Megatron-Core is first imported."""
    set_gpu_variables(os.environ)  # a rank has done so already; a program that uses this package may not have
    prefer_torch_cudnn(os.environ)
    for message in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not torch.cuda.is_available():
        # jit_fuser is torch.compile: it needs a C++ compiler and seconds per function, for no gain on a CPU.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


@cache
def activate() -> Platform:
    """Return the platform of this machine; it is prepared once per process, before Megatron-Core is first used."""
    if torch.cuda.is_available():
        return _gpu()
    from fiberpo_megatron.mcore.cpu import patches
    from fiberpo_megatron.mcore.cpu.cpu_platform import CpuPlatform

    with patches.without_compiler():
        patches.install()
    return CpuPlatform()


def _gpu() -> Platform:
    from fiberpo_megatron.mcore.gpu_platform import GpuPlatform

    return GpuPlatform()
