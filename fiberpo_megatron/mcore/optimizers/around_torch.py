"""This module puts a torch optimizer other than Adam into Megatron-Core's optimizers.

Megatron builds everything around Adam: parameter groups, float32 masters, shards, gradient norms over all ranks. None
of that depends on Adam. The torch optimizer inside is then replaced, which Megatron's wrappers allow: they read
`self.optimizer` at every step.
"""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from fiberpo_megatron.mcore.optimizers.base import TorchOptimizer, optimizer_class
from fiberpo_megatron.mcore.optimizers.build import optimizer_parts
from fiberpo_megatron.mcore.optimizers.sharded import sharded


def around_torch(built: MegatronOptimizer, optimizer: TorchOptimizer) -> MegatronOptimizer:
    """Return `built`, which Megatron made around Adam, with the torch optimizer of `optimizer` in Adam's place."""
    for part in optimizer_parts(built):
        if part.optimizer is not None:  # else this rank trains none of these parameters
            _replace(part, optimizer)
    return sharded(built, optimizer)


def _replace(part: Any, optimizer: TorchOptimizer) -> None:
    """Replace the torch optimizer inside one of Megatron's."""
    adam_only = part.optimizer.defaults.keys() - {"lr", "weight_decay"}
    groups = [{k: v for k, v in group.items() if k not in adam_only} for group in part.optimizer.param_groups]
    # A shard of a float32 parameter is a view of it, which torch's constructors refuse: they get a detached one.
    made = optimizer.torch_optimizer(
        [{**group, "params": [p if p.is_leaf else p.detach() for p in group["params"]]} for group in groups]
    )
    sizes = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in made.param_groups] != sizes:
        raise RuntimeError(
            f"{optimizer_class(optimizer)}.torch_optimizer() made {len(made.param_groups)} parameter groups of the "
            f"{len(groups)} that it was given, or moved parameters between them; keep the groups as they are, and tell "
            "parameters apart in step(), for example by their shape"
        )
    for group, given in zip(made.param_groups, groups, strict=True):
        group["params"] = given["params"]
    part.optimizer = made
    part.init_state_fn = lambda torch_optimizer, config=None: optimizer.create_state(torch_optimizer)
