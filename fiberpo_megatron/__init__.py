"""This package trains MoE language models by RL with FiberPO on Megatron-Core; SGLang serves the rollouts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiberpo_megatron.config import load_config
    from fiberpo_megatron.trainer.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "load_config"]


def __getattr__(name: str) -> Any:
    """Load `Run` and `load_config` when they are asked for: the worker of an environment needs neither, nor torch."""
    if name == "Run":
        from fiberpo_megatron.trainer.run import Run

        return Run
    if name == "load_config":
        from fiberpo_megatron.config import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
