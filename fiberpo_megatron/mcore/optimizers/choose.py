"""This module finds the optimizer that a config names, checks it before a run starts, and names it in checkpoints."""

from typing import TYPE_CHECKING

from fiberpo_megatron import plugins
from fiberpo_megatron.mcore.optimizers.base import Optimizer, optimizer_class
from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig
from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.plugins import PluginError

if TYPE_CHECKING:
    from fiberpo_megatron.config.schema import Config

KIND = "optimizer.kind"


def make_optimizer(settings: OptimizerConfig) -> Optimizer:
    """Return the optimizer of [optimizer]. Raises PluginError that names the setting and the fix."""
    plugin = plugins.find("optimizers", settings.kind.use, KIND)
    options = settings.options()
    plugins.require(plugin, ("build", "fresh_state", "state_bytes", "create_state"), KIND)
    plugins.check_options(plugin, options, KIND)
    plugins.check_version(plugin, settings.kind.version, KIND)
    try:
        made = plugin.target(**options)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{KIND}: {plugin.path} does not accept its options {options}: {error}") from error
    if not isinstance(made, Optimizer):
        raise PluginError(
            f"{KIND}: {plugin.path} is no fiberpo_megatron.mcore.optimizers.Optimizer; let it be a subclass of "
            "TorchOptimizer"
        )
    return made


def check_optimizer(config: "Config") -> None:
    """Raise PluginError when the optimizer cannot be found, does not take its options, or does not fit the layout.

    This needs no Megatron-Core and starts nothing.
    """
    check_layout(make_optimizer(config.optimizer), config.parallel)


def check_layout(optimizer: Optimizer, parallel: ParallelConfig) -> None:
    """Raise PluginError when the layout cuts matrices that the optimizer needs whole."""
    if not optimizer.whole_matrices:
        return
    name = optimizer_name(optimizer)
    why = f"the optimizer {name} updates whole matrices"
    if parallel.distributed_optimizer:
        raise PluginError(
            f"parallel.distributed_optimizer = true cuts every parameter into shards of one dimension, but {why}; set "
            "parallel.distributed_optimizer = false"
        )
    for setting in ("tensor", "expert_tensor"):
        size = getattr(parallel, setting)
        if size > 1:
            raise PluginError(
                f"parallel.{setting} = {size} cuts matrices over {size} ranks, but {why}; set it to 1, and use "
                "pipeline or expert parallelism for a model that does not fit"
            )


def optimizer_name(optimizer: Optimizer) -> str:
    """Return the name under which a checkpoint records the optimizer: a built-in's short name, or its import path."""
    path = optimizer_class(optimizer)
    return next((name for name, known in plugins.BUILT_IN["optimizers"].items() if known == path), path)
