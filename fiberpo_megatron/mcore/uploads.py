"""This module copies tensors of the host to the device ahead of their use."""

import torch
from torch import Tensor


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`; the host does not wait for the copy.

    A GPU reads out of pinned memory only. From elsewhere the driver first copies the values into pinned memory of its
    own, and the host waits for that.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
