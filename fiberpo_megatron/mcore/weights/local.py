"""Finds this rank's parameters under names that are the same in every layout."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from fiberpo_megatron.mcore.families import Rule, WeightTable, Whole
from fiberpo_megatron.mcore.families.transforms import Shard
from fiberpo_megatron.mcore.families.weight_tables import Match, canonical_name, fill


class WeightLayout(Protocol):
    """Describes what loading and exporting need to know of the parallel layout."""

    rank: int
    world_size: int
    data_rank: int
    context_rank: int
    tensor_rank: int
    tensor_size: int
    host_group: dist.ProcessGroup | None
    """Group of all ranks for messages between hosts; None for a single process."""

    def agree(self, error: str | None, where: str, *, raises: type[Exception] = ...) -> None:
        """Raise `raises` on every rank when any rank has an error; every rank must call this."""
        ...


@dataclass(frozen=True)
class LocalWeight:
    """Holds one parameter (or persistent buffer) of this rank and the rule that it follows."""

    name: str
    """The canonical name, which is the same in every layout."""
    tensor: Tensor
    rule: Rule
    match: Match
    shard: Shard

    @property
    def hf_names(self) -> list[str]:
        """Return the names of the Hugging Face tensors that the parameter is made of."""
        return [fill(template, self.match) for template in self.rule.hf]


def local_weights(model_chunks: Sequence[nn.Module], table: WeightTable, layout: WeightLayout) -> list[LocalWeight]:
    """Return this rank's parameters with their rules, in the model's order.

    Raises ValueError that names the parameters for which the table has no rule.
    """
    found: list[LocalWeight] = []
    strangers: list[str] = []
    for chunk in model_chunks:
        module = unwrapped(chunk)
        for name, tensor in _tensors(module):
            experts = _experts_of(module, name)
            first_expert = 0 if experts is None else experts.ep_group.rank() * experts.num_local_experts
            canonical = canonical_name(name, _layer_of(module, name), first_expert)
            described = table.rule_of(canonical)
            if described is None:
                strangers.append(name)
                continue
            rule, match = described
            if isinstance(rule.transform, Whole):
                shard = Shard(0, 1)
            elif experts is not None:
                shard = Shard(experts.tp_group.rank(), experts.tp_group.size())
            else:
                shard = Shard(layout.tensor_rank, layout.tensor_size)
            found.append(LocalWeight(canonical, tensor, rule, match, shard))
    if strangers:
        raise ValueError(
            f"no rule in the weight table for the parameter(s) {', '.join(strangers)}; the model has a part "
            "that this family's table does not describe"
        )
    return sorted(found, key=lambda weight: table.position(weight.name))


def _experts_of(module: nn.Module, name: str) -> Any:
    """Return the module of all local experts that a parameter belongs to; None for other parameters.

    That module knows its expert-parallel and expert-tensor-parallel groups.
    """
    found = re.match(r"(.*\.mlp\.experts)\.", name)
    return None if found is None else module.get_submodule(found[1])


def unwrapped(chunk: nn.Module) -> nn.Module:
    """Return the GPTModel inside the wrappers for data parallelism and half precision."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters, and the correction biases of the routers, which are persistent buffers."""
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name.endswith("router.expert_bias"))


def _layer_of(module: nn.Module, name: str) -> int | None:
    """Return the global number of a parameter's layer; in its name each model chunk counts its layers from 0."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    if found is None:
        return None
    layer = module.get_submodule(f"decoder.layers.{found[1]}")
    number = layer.layer_number
    assert isinstance(number, int)
    return number - 1
