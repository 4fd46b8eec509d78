"""This module holds the base classes of optimizers.

A torch optimizer becomes one of this package's by one class, in a file of yours:

    import torch
    from fiberpo_megatron.mcore.optimizers import TorchOptimizer

    class Momentum(TorchOptimizer):
        '''Stochastic gradient descent with momentum.'''

        def __init__(self, momentum: float = 0.9) -> None:
            if not 0 <= momentum < 1:
                raise ValueError(f"momentum = {momentum} must be at least 0 and less than 1")
            self.momentum = momentum

        def torch_optimizer(self, groups):
            return torch.optim.SGD(groups, momentum=self.momentum)

        def fresh_state(self, parameter):
            return {"momentum_buffer": torch.zeros_like(parameter)}

The config names it by its import path, and `options` are the arguments of its constructor:

    [optimizer]
    kind = {use = "my_package.momentum:Momentum", options = {momentum = 0.95}}
    learning_rate = 1e-3

The learning-rate schedule, weight decay, gradient clipping, float32 master weights, sharding over data-parallel ranks,
checkpoints, CPU offloading and the planner then work as they do for Adam.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from torch import Tensor

    from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig


class Optimizer(ABC):
    """Describes an optimizer: what Megatron-Core builds for it, and which state it keeps for each parameter.

    Subclass `TorchOptimizer` to bring a torch optimizer; subclass this class only to build Megatron's objects yourself.
    The arguments of the constructor are the options that a config may give. They should raise ValueError for values
    that make no sense: the constructor runs before any rank is started. Import Megatron-Core inside methods only.
    """

    whole_matrices: bool = False
    """Whether an update needs the whole matrix of a parameter, as Muon's does. The default is right for element-wise
    optimizers, for which any shard of a parameter can be updated alone. When True, a run is refused with
    `parallel.distributed_optimizer = true`, and with tensor parallelism, because both cut matrices into shards."""

    @abstractmethod
    def build(
        self, chunks: "list[DistributedDataParallel]", settings: "OptimizerConfig", *, dtype: str, distributed: bool
    ) -> "MegatronOptimizer":
        """Return Megatron's optimizer for the model chunks of this rank. Every rank calls it.

        `chunks` are wrapped for data parallelism. `settings` has learning rate, weight decay and clipping. `dtype` is
        the type of the parameters, "float32" or "bfloat16". `distributed` says whether the optimizer's state is sharded
        over the data-parallel ranks.
        """

    @abstractmethod
    def fresh_state(self, parameter: "Tensor") -> "dict[str, Tensor]":
        """Return the state that the optimizer keeps for `parameter`, as it is before the first step, by name.

        `parameter` is the float32 tensor that the optimizer updates: [n], a part of a parameter, under the distributed
        optimizer, else the rank's whole parameter. It may be on the device "meta", where only shapes and types count.
        Every tensor has the parameter's shape. The one exception is "step": a float32 number of no dimension that is
        the same for all parameters. Names and types are those that the torch optimizer uses in `state[parameter]`:
        Megatron reads them when it saves, and before it loads, a checkpoint.
        """

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of the state of a parameter of this shape, master weights not included.

        The planner asks this. The default counts the tensors of `fresh_state`.
        """
        return _state_bytes(self, tuple(shape))

    def create_state(self, torch_optimizer: "torch.optim.Optimizer") -> None:
        """Give every parameter of `torch_optimizer` its fresh state where it has none yet.

        Raises RuntimeError when a parameter has other state than `fresh_state` names: it would not be saved.
        """
        for group in torch_optimizer.param_groups:
            for parameter in group["params"]:
                state, parameter = torch_optimizer.state[parameter], parameter.detach()
                expected = self.fresh_state(parameter.to("meta")).keys()
                if not state:
                    state.update(self._checked(self.fresh_state(parameter), parameter))
                elif state.keys() != expected:
                    raise RuntimeError(
                        f"{optimizer_class(self)}: the state of a parameter holds {sorted(state)}, but fresh_state() "
                        f"names {sorted(expected)}; correct fresh_state(), because a checkpoint holds what it names"
                    )

    def _checked(self, state: "dict[str, Tensor]", parameter: "Tensor") -> "dict[str, Tensor]":
        for name, tensor in state.items():
            if name == "step":
                fits, wanted = tensor.dim() == 0, "no dimension"
            else:
                fits, wanted = tensor.shape == parameter.shape, f"the parameter's shape {tuple(parameter.shape)}"
            if not fits:
                raise RuntimeError(
                    f"{optimizer_class(self)}: fresh_state() returned {name!r} of shape {tuple(tensor.shape)}; it must "
                    f"have {wanted}"
                )
            if name in _TAKEN:
                raise RuntimeError(
                    f"{optimizer_class(self)}: fresh_state() uses the name {name!r}, which Megatron-Core's checkpoints "
                    "need for themselves; choose another"
                )
        return state


_TAKEN = {"param", "fp32_param", "numel_unpadded"} | {"step"[i:j] for i in range(4) for j in range(i + 1, 5)} - {"step"}
"""Names that Megatron-Core uses in checkpoints. It also leaves out every state whose name is a part of "step"."""


class TorchOptimizer(Optimizer):
    """Brings a torch optimizer. See the module's docstring for an example."""

    @abstractmethod
    def torch_optimizer(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """Return the torch optimizer of these parameter groups. Every rank calls it, once for each part of the model.

        Each group has `params`, `lr` and `weight_decay`. The schedule sets `lr` and `weight_decay` before every step
        (the latter is 0 in the group of norms and biases), so `step()` must read them from `self.param_groups`. It
        must also read the parameters from there, because Megatron replaces them by float32 master weights and shards.
        `parameter.grad` is the clipped float32 gradient; adding the weight decay is the optimizer's own task. Keep the
        groups and their order.
        """

    def build(
        self, chunks: "list[DistributedDataParallel]", settings: "OptimizerConfig", *, dtype: str, distributed: bool
    ) -> "MegatronOptimizer":
        """Return Megatron's optimizer around `torch_optimizer`."""
        from fiberpo_megatron.mcore.optimizers.around_torch import around_torch
        from fiberpo_megatron.mcore.optimizers.build import megatron_adam

        return around_torch(megatron_adam(chunks, settings, dtype=dtype, distributed=distributed), self)


def optimizer_class(optimizer: Optimizer) -> str:
    """Return the import path of an optimizer's class."""
    return f"{type(optimizer).__module__}:{type(optimizer).__qualname__}"


@lru_cache(maxsize=4096)  # a model has many parameters of few shapes
def _state_bytes(optimizer: Optimizer, shape: tuple[int, ...]) -> int:
    import torch

    parameter = torch.empty(shape, dtype=torch.float32, device="meta")
    return sum(tensor.nbytes for tensor in optimizer.fresh_state(parameter).values())
