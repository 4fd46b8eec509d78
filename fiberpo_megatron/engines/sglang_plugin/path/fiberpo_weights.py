"""This module of the SGLang plugin loads weights out of memory that the trainer shares with the server.

`weight_sync/ipc.py` describes the memory in JSON, which takes the place of SGLang's pickled tensors in a request to
/update_weights_from_tensor. Nothing is unpickled, and every number of the description is checked.
"""

import base64
import json
import math
import mmap
import os
import stat
from collections.abc import Callable
from typing import Any

MAGIC = b"fiberpo-weights-1\n"
"""Every description begins with this."""
TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "int64")

_open: dict[str, Any] = {}
"""The buffers that this process has opened, by the token that the trainer drew for each."""


class BadDescription(ValueError):
    """This is raised for a description that does not fit the memory."""


def tensors(payload: bytes, device: Any) -> list[tuple[str, Any]]:
    """Return names and tensors that a description names; they are views of shared memory.

    `device` is the torch device of this process. Raises BadDescription, and OSError for memory that is gone.
    """
    import torch

    described = json.loads(payload[len(MAGIC) :])
    buffers = [_buffer(of_owner, torch.device(device)) for of_owner in described["buffers"]]
    used = {alternatives["token"] for of_owner in described["buffers"] for alternatives in of_owner}
    for token in _open.keys() - used - set(described["keep"]):  # those of an earlier publication
        del _open[token]
    return [_view(buffers, *entry) for entry in described["tensors"]]


def _view(buffers: list[Any], name: str, dtype: str, shape: list[int], buffer: int, offset: int) -> tuple[str, Any]:
    import torch

    if dtype not in TYPES:
        raise BadDescription(f"{name}: the type {dtype!r} is not one of {', '.join(TYPES)}")
    kind = getattr(torch, dtype)
    if not all(isinstance(n, int) and n >= 0 for n in [*shape, buffer, offset]) or buffer >= len(buffers):
        raise BadDescription(f"{name}: shape {shape}, buffer {buffer} or offset {offset} is no whole number in range")
    size = math.prod(shape) * kind.itemsize
    if offset % kind.itemsize or offset + size > buffers[buffer].numel():
        raise BadDescription(f"{name}: {size} bytes from {offset} on are not in a buffer of {buffers[buffer].numel()}")
    return name, buffers[buffer][offset : offset + size].view(kind).view(shape)


def _buffer(alternatives: list[dict[str, Any]], device: Any) -> Any:
    """Return one buffer as uint8 [bytes]. Of several alternatives it is the one on this process's device."""
    for handle in alternatives:
        if "device" not in handle or handle["device"] == _identity(device):
            if handle["token"] not in _open:
                _open[handle["token"]] = _mapped(handle) if "device" not in handle else _on_gpu(handle, device)
            return _open[handle["token"]]
    raise BadDescription(f"no training rank shares memory of {device} ({_identity(device)})")


def _identity(device: Any) -> str:
    """Return the name of a GPU that is the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def _mapped(handle: dict[str, Any]) -> Any:
    """Map memory of another process of the same user, which has no name in any file system."""
    import torch

    path = f"/proc/{int(handle['process'])}/fd/{int(handle['descriptor'])}"
    expected = f"/memfd:fiberpo-{handle['token']} (deleted)"
    if os.readlink(path) != expected:
        raise BadDescription(f"{path} is not the memory that was announced; the trainer ended meanwhile")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_size < int(handle["bytes"]):
            raise BadDescription(f"{path} has {found.st_size} bytes of user {found.st_uid}, or is no memory")
        return torch.frombuffer(mmap.mmap(descriptor, int(handle["bytes"])), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _on_gpu(handle: dict[str, Any], device: Any) -> Any:
    """Open memory of a GPU that another process allocated, by the handle that CUDA made for it."""
    import torch

    secret = [base64.b64decode(value) if isinstance(value, str) else value for value in handle["storage"]]
    storage = torch.UntypedStorage._new_shared_cuda(torch.device(device).index or 0, *secret)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (int(handle["bytes"]),))


def release() -> None:
    """Release the buffers on GPUs, which torch in the trainer counts.

    Host memory stays mapped until the trainer announces other buffers: the first read through a new mapping of 128 MiB
    took 13 to 20 ms more than another one, and taking the mapping down 4 to 12 ms. The trainer keeps that memory for
    the whole run as well.
    """
    for token in [token for token, buffer in _open.items() if buffer.is_cuda]:
        del _open[token]


def update(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Load a description in place of SGLang's pickled tensors; a request of another kind is SGLang's own.

    A failure is an answer. SGLang itself would end the server for a tensor of the wrong shape.
    """
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput as Answer
    from sglang.srt.runtime_context import get_parallel

    payloads = request.serialized_named_tensors
    if not payloads or bytes(payloads[0][: len(MAGIC)]) != MAGIC:
        return original(manager, request)
    import torch

    runner = manager.tp_worker.model_runner
    device = torch.device(runner.device, runner.gpu_id) if runner.device == "cuda" else torch.device("cpu")
    worker = manager.tp_worker
    try:
        found = tensors(bytes(payloads[get_parallel().tp_rank]), device)
        if not found:  # the trainer asks before it pauses anything
            return Answer(success=True, message="this server can read the memory")
        worker.deserialize_own_rank = lambda _: found
        answer = original(manager, request)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the trainer writes into the same memory again
        return answer
    except Exception as error:
        if manager._session is not None:
            torch.distributed.barrier(group=manager.tp_cpu_group)  # the other ranks wait in the original's
        return Answer(success=False, message=f"{type(error).__name__}: {error}")
    finally:
        worker.__dict__.pop("deserialize_own_rank", None)
        if request.weight_version is not None:  # the last round, or the first, whose buffers are opened again
            release()


def register() -> None:
    """Register the hooks of this module."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".update_weights_from_tensor",
        update,
        HookType.AROUND,
    )
