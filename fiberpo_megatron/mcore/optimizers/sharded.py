"""This module is the distributed optimizer: each data-parallel rank has the state of its shard of every parameter.

Megatron-Core's class is used for everything but checkpoints, for three reasons. It gathers the whole state on one rank
or on all of them before it is saved. It knows the names of Adam's moments only. And where a buffer has several buckets,
as that of a model with tied embeddings on pipeline stages has, it mistakes the place of all parameters behind the first
bucket's padding (megatron-core 0.16.1 warns that they are "padded with zeros"): a resumed run would go on with other
weights and moments.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from fiberpo_megatron.mcore.optimizers.base import Optimizer
from fiberpo_megatron.mcore.optimizers.build import optimizer_parts
from fiberpo_megatron.mcore.optimizers.pieces import pieces
from fiberpo_megatron.mcore.versions import group_identity


def sharded(built: MegatronOptimizer, optimizer: Optimizer) -> MegatronOptimizer:
    """Return `built` with a `ShardedOptimizer` in place of each distributed optimizer of Megatron."""
    return ChainedOptimizer(
        [
            ShardedOptimizer(part, optimizer)
            if isinstance(part, DistributedOptimizer) and part.optimizer is not None
            else part
            for part in optimizer_parts(built)
        ]
    )


class ShardedOptimizer(DistributedOptimizer):
    """Shards any element-wise torch optimizer as Megatron's distributed optimizer does.

    Checkpoints have Megatron's format "fully_reshardable": whole tensors under the parameters' names, which any layout
    can load. Each rank writes its own parts of them, and reads its own. `built` has the torch optimizer and is not to
    be used afterwards. `optimizer` names its state.
    """

    def __init__(self, built: DistributedOptimizer, optimizer: Optimizer) -> None:
        self.__dict__.update(built.__dict__)  # Megatron's constructor accepts Adam alone
        fresh = optimizer.fresh_state(torch.empty(1, device="meta"))
        self._counts_per_parameter = "step" in fresh
        self._types = {"param": torch.float32, **{k: v.dtype for k, v in fresh.items() if k != "step"}}

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups with the number of steps, without parameters and their state."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        counted = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        counted += [
            float(group["step"]) for group in self.optimizer.param_groups if group["params"] and "step" in group
        ]
        if len(set(counted)) > 1:
            raise RuntimeError(f"the parameters have taken different numbers of steps, {sorted(set(counted))}")
        if counted:
            groups = [{**group, "step": counted[0]} for group in groups]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over parameter groups, number of steps and, where it is included, the parameters' state."""
        saved = {group_identity(group): group for group in state_dict["optimizer"]["param_groups"]}
        for group in self.optimizer.param_groups:
            found = saved[group_identity(group)]
            group.update({k: v for k, v in found.items() if k not in ("params", "step")})
            if "step" not in found:
                continue
            if not self._counts_per_parameter:
                group["step"] = int(found["step"])
            for parameter in group["params"] if self._counts_per_parameter else ():
                self.optimizer.state[parameter]["step"].fill_(found["step"])
        if "param_state" in state_dict:
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[int, Any]:
        """Return this rank's shard of the state by number of the parameter and name, for saving and for loading.

        Nothing is gathered: each rank writes and reads what it has (`pieces.py`).
        """
        tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        described = {base.data: base for base in nested_values(tensors)}
        state: dict[int, Any] = {}
        for number, (parameter, begin) in enumerate(self._held()):
            shards = self._get_main_param_and_optimizer_states(parameter)
            state[number] = {
                name: pieces(described[parameter], f"optimizer.state.{name}", shards[name].detach(), begin)
                for name in self._types
            }
        return state

    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[int, Any]) -> None:
        """Take over what was read into the pieces of `sharded_param_state_fully_reshardable`."""
        for number, (parameter, _) in enumerate(self._held()):
            shards = self._get_main_param_and_optimizer_states(parameter)
            for name in self._types:
                shard, at = shards[name].detach(), 0
                for read in state_dict[number][name]:
                    target = shard[at : at + read.numel()]
                    if target.data_ptr() != read.data_ptr():  # it is read in place where nothing has moved
                        target.copy_(read.reshape(-1))
                    at += read.numel()

    def _held(self) -> Iterator[tuple[Any, int]]:
        """Yield the parameters of which this rank has a shard, and the element of each at which the shard begins."""
        for ranges in self.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, place in bucket["param_map"].items():
                        yield parameter, place["param"].start
