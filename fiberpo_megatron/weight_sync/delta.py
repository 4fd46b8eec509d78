"""This module finds what changed in the weights since the publication before, for engines behind a slow network."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

AT, TO = "#at", "#to"
"""Ends of the names of the positions of changed elements, uint32 as int32 [n], and of their new values, [n]."""
MANIFEST = "delta.json"
BASE_IS_MISSING = "this server does not hold the weights on which the publication builds"
"""An engine answers this when it has no copy of the last publication (sglang_plugin/path/fiberpo_delta.py)."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Differences:
    """Keeps this rank's share of the last publication in host memory, and compares the next one with it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._coming: dict[str, Tensor] = {}
        self.checksums: dict[str, str] = {}
        """SHA-256 of the bytes of every tensor that `changes` has seen."""

    def changes(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a file of differences must have, on the host.

        That is nothing for a tensor that is the same, the positions and values of elements that are not, and the whole
        tensor where that takes fewer bytes. A tensor that the last publication lacked is returned whole.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            new = tensor.detach().cpu().contiguous().clone().view(-1)
            self._coming[name] = new
            bits = new.view(_INTEGERS[new.itemsize])
            self.checksums[name] = hashlib.sha256(bits.view(torch.uint8).numpy().data).hexdigest()
            old = self._kept.get(name)
            if old is None:
                found[name] = tensor
                continue
            at = (bits != old.view(bits.dtype)).nonzero().view(-1)
            if len(at) * (4 + new.itemsize) >= new.nbytes or len(new) >= 2**31:
                found[name] = tensor
            elif len(at):
                found[name + AT], found[name + TO] = at.int(), new[at]
        return found

    def published(self) -> None:
        """Take the tensors that `changes` has seen as those of the last publication."""
        self._kept, self._coming = self._coming, {}

    def forget(self) -> None:
        """Have the next publication hold all weights."""
        self._kept, self._coming = {}, {}


def whole(checksums: Mapping[str, str]) -> str:
    """Return one checksum of all tensors."""
    return hashlib.sha256(json.dumps(sorted(checksums.items())).encode()).hexdigest()
