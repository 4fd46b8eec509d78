"""This module holds everything in which the supported versions of Megatron-Core differ for this package.

The CPU platform's patches are apart: `mcore/cpu/patches.py` says which of them concern one version alone. 0.16.1 is the
newest version for Python 3.11, and what CI runs; 0.19.2 asks for Python 3.12. All other names that the package imports
from Megatron-Core exist in both. `tests/mcore/test_versions.py` tests both shapes of each difference, and
`tests/distributed/test_later_megatron.py` runs whole suites over 0.19.2.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common as common_strategies
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor


def set_router(layer_spec: Any, router: type) -> None:
    """Put a router class into the specification of a layer with experts.

    0.16.1 describes the experts' part by a ModuleSpec, 0.19.2 by a `functools.partial` of the module's class.
    """
    _parts(layer_spec.submodules.mlp).router = router


def _parts(description: Any) -> Any:
    """Return the submodules of a description of either version."""
    partial = isinstance(description, functools.partial)
    return description.keywords["submodules"] if partial else description.submodules


def group_identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a parameter group of an optimizer from the others, in every layout.

    0.16.1 sets all of the keys that it names; 0.19.2 leaves out those that have no value.
    """
    return tuple(group.get(key) for key in param_group_identifier_keys)


def save_common(state: Mapping[str, Any], folder: str) -> None:
    """Write what is no tensor of a checkpoint into its folder; rank 0 alone calls it.

    0.16.1 has a strategy object for it, 0.19.2 a function.
    """
    strategy = getattr(common_strategies, "TorchCommonSaveStrategy", None)
    if strategy is not None:
        strategy("torch", 1).save_common(state, folder)
    else:
        common_strategies.save_common(state, folder)


def load_checkpoint(
    wanted: dict[str, Any], folder: str, *, common: dict[str, Any], tensors: Any, strict: Any
) -> dict[str, Any]:
    """Read a distributed checkpoint whose common state has been read before, and return the loaded state.

    `tensors` is the strategy that reads tensors, `strict` what is done about names that do not fit. 0.16.1 takes a
    strategy for the common state; 0.19.2 always reads the file, which this package does not unpickle freely.
    """
    options = {"sharded_strategy": tensors, "strict": strict}
    options["validate_access_integrity"] = False  # it would bring every rank's list of tensors to every rank
    if "common_strategy" in inspect.signature(serialization.load).parameters:
        loaded: dict[str, Any] = serialization.load(wanted, folder, common_strategy=_read_before(common), **options)
        return loaded
    reads = serialization.load_common_state_dict
    serialization.load_common_state_dict = lambda folder: common
    try:
        loaded = serialization.load(wanted, folder, **options)
    finally:
        serialization.load_common_state_dict = reads
    return loaded


def _read_before(common: dict[str, Any]) -> Any:
    """Return a strategy of 0.16.1 that gives out this common state."""

    class Known(common_strategies.TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
            return common

    return Known()


def set_grouped_layers(layer_spec: Any) -> None:
    """Put layers of grouped products that can be saved after FP8 into the specification of a layer with experts.

    Newer versions of Transformer Engine, such as 2.20.2, give an empty tensor as the state of recipes whose scales come
    from the tensor itself. 0.16.1 takes a state with content for granted once FP8 has run,
    and fails with "'NoneType' object is not subscriptable". 0.19.2 takes an empty one, and keeps its own layers.
    """
    experts = _parts(layer_spec.submodules.mlp).experts
    if isinstance(experts, functools.partial):
        return  # the shape of 0.19.2
    layers = experts.submodules
    for name in ("linear_fc1", "linear_fc2"):
        setattr(layers, name, _saves_empty_states(getattr(layers, name)))


@functools.cache
def _saves_empty_states(grouped: Any) -> Any:
    class SavesEmptyStates(grouped):
        """Is the class of Megatron-Core, which also cuts an empty FP8 state into one for each expert."""

        def _split_extra_state(self, state: Any) -> list[Any]:
            if isinstance(state, Tensor) and not state.numel():
                return [state] * self.num_gemms
            parts: list[Any] = super()._split_extra_state(state)
            return parts

    SavesEmptyStates.__name__ = SavesEmptyStates.__qualname__ = grouped.__name__
    return SavesEmptyStates
