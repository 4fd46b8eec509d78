"""This is Megatron's router with statistics that count only real tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Leaves the padding of packed rows out of the load of experts, which moves the correction bias and the auxiliary
    loss.

    Megatron has a padding mask for that, but 0.16.1 cuts it for sequence parallelism on the first pipeline stage only,
    and applies it to the load in the wrong shape. Here the mask comes from `router_replay`, which knows the micro-batch
    (`routing.py`).
    """

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (probabilities, map of the chosen experts), both [rows, experts], of hidden states [rows, 1, h]."""
        if self.router_replay is not None:
            padding_mask = self.router_replay.padding()
        routed: tuple[Tensor, Tensor] = super().forward(input, padding_mask)
        return routed

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask[:, None])

    def _apply_aux_loss(self, probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.router_replay is not None and not self.router_replay.any_token():
            return probs  # the mean over no tokens is undefined
        applied: Tensor = super()._apply_aux_loss(probs, *args, **kwargs)
        return applied


def correction_biases(models: Sequence[torch.nn.Module]) -> list[Tensor]:
    """Return the correction bias of every router of these models that has one."""
    routers = [module for model in models for module in model.modules() if isinstance(module, Router)]
    return [router.expert_bias for router in routers if router.expert_bias is not None]


@contextmanager
def kept_on_error(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give the tensors their values back when the body raises."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)
        raise
