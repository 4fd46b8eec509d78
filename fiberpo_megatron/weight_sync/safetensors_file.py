"""This module writes safetensors files straight out of the tensors' memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of types in the format."""


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode that the umask gives: an engine may run as another user.

    The library's own `save_file` copies every tensor first, and makes a file that only its owner can read. Raises
    OSError of the file system, and KeyError for a type that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts = []
    at = 0
    # Large elements first, so that each tensor is aligned to its type.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        end = at + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        parts.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))
        at = end
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb", buffering=0) as file:
        for left in (memoryview(len(text).to_bytes(8, "little") + text), *(part.numpy().data for part in parts)):
            while left:
                left = left[file.write(left) :]
