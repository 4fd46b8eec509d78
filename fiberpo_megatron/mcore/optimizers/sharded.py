"""This module is the distributed optimizer: each data-parallel rank has the state of its shard of every parameter.

Megatron-Core's class is used for everything but checkpoints, for two reasons. It knows the names of Adam's moments
only. And where a buffer has several buckets, as that of a model with tied embeddings on pipeline stages has, it
mistakes the place of all parameters behind the first bucket's padding (megatron-core 0.16.1 warns that they are "padded
with zeros"): a resumed run would go on with other weights and moments.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

from fiberpo_megatron.mcore.optimizers.base import Optimizer
from fiberpo_megatron.mcore.optimizers.build import optimizer_parts

GATHER_BYTES = 256 * 2**20
"""A checkpoint takes at most so many bytes of the device's memory at a time on the rank that gathers the state."""


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
    can load. `built` has the torch optimizer and is not to be used afterwards. `optimizer` names its state.
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
        saved = {_identity(group): group for group in state_dict["optimizer"]["param_groups"]}
        for group in self.optimizer.param_groups:
            found = saved[_identity(group)]
            group.update({k: v for k, v in found.items() if k not in ("params", "step")})
            if "step" not in found:
                continue
            if not self._counts_per_parameter:
                group["step"] = int(found["step"])
            for parameter in group["params"] if self._counts_per_parameter else ():
                self.optimizer.state[parameter]["step"].fill_(found["step"])
        if "param_state" in state_dict:
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])

    def get_parameter_state_dp_zero(
        self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[int, dict[Any, dict[str, Tensor]]]:
        """Return master weights and state of all data-parallel ranks, by buffer, type of the buffer and name.

        Each is a tensor on the host with an element for each of the buffer's, padding included. The first data-parallel
        rank gets everything, because it alone writes it. The others get tensors of the same shapes that take no memory,
        since Megatron looks at the shapes on every rank. With `empty_data` the elements are undefined, and their memory
        is taken where something is read into them.
        """
        if use_gloo_comm or not return_on_all_ranks:
            raise NotImplementedError("this optimizer is saved in the format fully_reshardable, which asks all ranks")
        first = self.data_parallel_group.rank() == 0
        found: dict[int, dict[Any, dict[str, Tensor]]] = {}
        for index, ranges in enumerate(self.gbuf_ranges):
            ((dtype, buckets),) = ranges.items()
            sizes = [bucket.grad_data.numel() for bucket in self.buffers[index].buckets]
            world = {
                name: torch.empty(sum(sizes), dtype=kind)
                if first or empty_data
                else torch.zeros((), dtype=kind).expand(sum(sizes))
                for name, kind in self._types.items()
            }
            start = 0
            for bucket, size in zip(buckets, sizes, strict=True):
                for name, target in world.items() if not empty_data else ():
                    self._gather(bucket["param_map"], name, target[start : start + size])
                start += size
            found[index] = {dtype: world}
        return found

    def _gather(self, shards: dict[Any, Any], name: str, target: Tensor) -> None:
        """Bring one state of all parameters of a bucket from all data-parallel ranks into `target` on the first.

        It goes in pieces: a whole bucket may be larger than the memory that is free on the device.
        """
        ranks, first = self.data_parallel_group.size(), self.data_parallel_group.rank() == 0
        share = len(target) // ranks
        mine = torch.zeros(share, dtype=target.dtype, device=self.buffers[0].grad_data.device)
        for parameter, place in shards.items():
            at = place["gbuf_local"]
            mine[at.start : at.end] = self._get_main_param_and_optimizer_states(parameter)[name].detach()
        size = max(1, GATHER_BYTES // (ranks * mine.element_size()))
        for begin in range(0, share, size):
            piece = mine[begin : begin + size]
            received = [torch.empty_like(piece) for _ in range(ranks)] if first else None
            torch.distributed.gather(piece, received, group=self.data_parallel_group, group_dst=0)
            for rank, values in enumerate(received or ()):
                at = rank * share + begin
                target[at : at + len(values)] = values

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[int, Any]:
        """Return the state by number of the parameter, in Megatron's order; for loading only that of parameters of
        which this rank has a part, so that it reads and holds no others."""
        state: dict[int, Any] = super().sharded_param_state_fully_reshardable(
            model_sharded_state_dict, is_loading, metadata
        )
        if not is_loading:
            return state
        maps = [bucket["param_map"] for ranges in self.gbuf_ranges for found in ranges.values() for bucket in found]
        order = [parameter for buffer in self.buffers for parameter in buffer.param_index_map]
        held = {number: part for number, part in state.items() if any(order[number] in map_ for map_ in maps)}
        return held or state  # a shard of nothing but padding

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Tensor]) -> None:
        """Copy a loaded shard into the master weight and the state of a parameter."""
        mine = self._get_main_param_and_optimizer_states(model_param)
        for name in self._types:
            mine[name].detach().copy_(tensors[name])


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a parameter group from the others, in every layout."""
    return tuple(group[key] for key in param_group_identifier_keys)
