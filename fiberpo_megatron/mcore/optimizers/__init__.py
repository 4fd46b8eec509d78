"""This package holds the base class of optimizers, Adam, and what Megatron-Core builds around them.

An optimizer of your own is one class in a file of yours; `base.py` shows how it is written. Importing this package
loads neither torch nor Megatron-Core, so that the planner and the checks before a run can ask an optimizer questions.
"""

from fiberpo_megatron.mcore.optimizers.base import Optimizer, TorchOptimizer
from fiberpo_megatron.mcore.optimizers.choose import check_optimizer, make_optimizer, optimizer_name

__all__ = ["Optimizer", "TorchOptimizer", "check_optimizer", "make_optimizer", "optimizer_name"]
