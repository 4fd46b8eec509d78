"""This module keeps the weights of a reference in host memory; they take turns on the device with the policy's.

The reference has the policy's architecture and layout: each rank keeps the reference's part of its own parameters.
`exchanged` swaps the two in place, a parameter at a time, so that parameters keep their identity (Megatron's flat
buffers hold them as views) and the policy has the bits that it had. While the reference is on the device, the policy
waits in the host memory that the reference left: a rank needs as much host memory as its parameters take, and on the
device room for its largest parameter.

What depends on training is not touched: the optimizer keeps its own float32 masters, and a pass without gradient moves
no correction bias and no load statistics. The correction biases of routers are part of the weights and are exchanged
with them; the reference routes tokens by its own routers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fiberpo_megatron.mcore.router import correction_biases


class ReferenceWeights:
    """Holds a copy of the weights that these models have when it is made, in pinned memory where they are on a GPU."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        parameters = [parameter for model in models for parameter in model.parameters()]
        self._weights: list[Tensor] = [*parameters, *correction_biases(models)]
        self._host = [_host_copy(weight) for weight in self._weights]
        self._on_device = False

    @property
    def host_bytes(self) -> int:
        """Return the bytes of host memory."""
        return sum(copy.nbytes for copy in self._host)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Let the models have the reference's weights inside the block, and their own again after it.

        What the block writes into the weights is kept as the reference. Raises RuntimeError inside such a block.
        """
        if self._on_device:
            raise RuntimeError("the reference's weights are on the device already; leave the block that put them there")
        self._exchange()
        self._on_device = True
        try:
            yield
        finally:
            self._exchange()
            self._on_device = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, host in zip(self._weights, self._host):
            kept = weight.detach().clone()
            weight.copy_(host, non_blocking=True)
            host.copy_(kept, non_blocking=True)  # in the stream's order, after `host` was read
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def _host_copy(weight: Tensor) -> Tensor:
    copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
    return copy.copy_(weight.detach())
