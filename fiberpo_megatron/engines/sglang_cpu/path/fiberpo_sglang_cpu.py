"""This plugin of SGLang (entry-point group `sglang.srt.plugins`) adapts servers without a GPU."""

import multiprocessing
from collections.abc import Sequence
from typing import Any


def _plain_buffer(
    dims: Sequence[int],
    dtype: Any,
    device: str,
    pin_memory: bool,
    allocator: object,
    registration_granularity_bytes: int | None = None,
) -> Any:
    """Return a host buffer that is not registered with a CUDA driver."""
    import torch

    return torch.empty(dims, dtype=dtype, device=device)


def _nothing(*args: object, **kwargs: object) -> None:
    """Do nothing, because batch-invariant Triton kernels are not installed on a CPU."""


def _fork(*args: object, **kwargs: object) -> None:
    """Start scheduler and detokenizer as forks, so that they need not import everything again."""
    multiprocessing.set_start_method("fork", force=True)


def register() -> None:
    """Register the hooks; SGLang calls this entry point."""
    from sglang.srt import server_args
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    ALLOC_MEMORY_FUNCS["cpu"] = _plain_buffer
    server_args.add_deterministic_attention_backend_choices(["torch_native"])
    HookRegistry.register("sglang.srt.batch_invariant_ops.enable_batch_invariant_mode", _nothing, HookType.REPLACE)
    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _fork, HookType.AFTER)
