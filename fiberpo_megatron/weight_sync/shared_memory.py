"""This module makes buffers that another process on the same machine can read without a copy."""

import base64
import mmap
import os
import secrets
from typing import Any

import torch
from torch import Tensor


class SharedBuffer:
    """This is a buffer of `nbytes` bytes on `device`, which an engine opens by its handle.

    In host memory it is an anonymous file (memfd): it has no name in a file system, and the kernel frees it when its
    last user has ended, however that happens. In GPU memory it is an allocation of torch's with a handle of CUDA's
    interprocess communication.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.token = secrets.token_hex(16)
        self.nbytes = max(nbytes, 1)
        self._descriptor: int | None = None
        self._handle: dict[str, Any]
        if device.type == "cuda":
            self.bytes: Tensor = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
            self._handle = self._gpu_handle(device)
        else:
            self._descriptor = os.memfd_create(f"fiberpo-{self.token}", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, self.nbytes)
            self.bytes = torch.frombuffer(mmap.mmap(self._descriptor, self.nbytes), dtype=torch.uint8)
            self._handle = {"process": os.getpid(), "descriptor": self._descriptor}

    @property
    def handle(self) -> dict[str, Any]:
        """Return what an engine needs to open the buffer, as JSON values."""
        return {"token": self.token, "bytes": self.nbytes, **self._handle}

    def _gpu_handle(self, device: torch.device) -> dict[str, Any]:
        # The tensor may be a part of a larger allocation, and the storage's handle knows where it begins.
        _, *values = self.bytes.untyped_storage()._share_cuda_()
        coded = [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in values]
        return {"device": str(torch.cuda.get_device_properties(device).uuid), "storage": coded}

    def close(self) -> None:
        """Release the memory; an engine that still maps it keeps its own view. A second call does nothing."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
