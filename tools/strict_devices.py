"""This module makes tensors of a CPU build behave as if some of them were on a GPU, as far as devices are concerned.

    with StrictDevices() as found:
        ...  # code that asks for "cuda" gets CPU tensors that are tagged as the device's
    found.waits  # how often the host waited for the device, by kind and by place in the source

Every storage is tagged as the host's or the device's. Inside the block `.device`, `.is_cuda`, `.to(...)`, `.cuda()`,
`.cpu()` and `device=` act on the tags. What CUDA refuses is refused: an operation on tensors of both sides, `.numpy()`
of a device tensor, a collective whose tensors do not fit the backend of its group. Everything for which the host of a
GPU waits is counted: `.item()`, `.tolist()`, `.cpu()`, `nonzero()` and its relatives, indexing with a boolean mask,
blocking copies in both directions, and synchronisation of streams.

The kernels themselves run on the CPU, so that the results are those of the CPU build.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
FREE = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty"),
}
"""aten operations that start nothing on a device."""
WAITS = {
    *("_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "unique_consecutive", "unique_dim"),
    "_unique2",
}
"""aten operations whose result's value or shape the host waits for."""
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"copy_", "copy", "_to_copy", "_copy_from"}
_FROM_PYTHON = {"tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor"}
"""Functions that make a tensor of Python data on the host and then copy it."""


_SOURCES = ("fiberpo_megatron/", "/megatron/", "/tests/")
_WithoutModes = torch._C.DisableTorchFunction


class DeviceError(RuntimeError):
    """A GPU would refuse what the code just did with tensors of the host and of the device."""


@dataclass
class Found:
    """Holds what the code in a block asked of the device."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often the host waited, by kind and place."""
    operations: int = 0
    """Torch operations that start a kernel or a copy on the device."""
    on_host: bool = False
    """Whether Python is making a tensor without naming a device, which it does in a backward pass, too: a layer that is
    computed again runs there."""

    @contextmanager
    def making_on_host(self) -> Iterator[None]:
        """Say inside the block that what is made of no tensors is on the host."""
        self.on_host = True
        try:
            yield
        finally:
            self.on_host = False

    uploads: Counter[tuple[str, bool, str]] = field(default_factory=Counter)
    """Bytes of copies to the device for which the host does not wait, by type, by whether the source is in pinned
    memory, and by place. Out of other memory the driver copies them into memory of its own first."""

    @property
    def total(self) -> int:
        """Return the number of waits."""
        return sum(self.waits.values())

    def table(self) -> str:
        """Return the waits as lines of text, the most frequent first."""
        rows = sorted(self.waits.items(), key=lambda item: (-item[1], item[0]))
        return "\n".join(f"{count:5d}  {kind:16s} {place}" for (kind, place), count in rows)

    def upload(self, source: Tensor) -> None:
        """Count one copy to the device for which the host does not wait."""
        pinned = getattr(_storage(source), "pinned", False)
        self.uploads[str(source.dtype).removeprefix("torch."), pinned, place()] += source.nbytes
        self.operations += 1

    def wait(self, kind: str) -> None:
        """Count one wait of the host at the current place in the source."""
        self.waits[kind, place()] += 1
        self.operations += 1


def place() -> str:
    """Return file, line and function of the innermost frame of this package, of Megatron-Core or of a test."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in _SOURCES) and not name.endswith("cpu/patches.py"):
            path = Path(name)
            return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the package"


def on_device(tensor: Tensor) -> bool:
    """Return whether a tensor's storage is tagged as the device's."""
    return getattr(_storage(tensor), "of_device", False)


def put_on_device(tensor: Tensor) -> Tensor:
    """Tag the storage of a tensor as the device's and return the tensor."""
    _storage(tensor).of_device = True  # type: ignore[attr-defined]
    return tensor


def _pinned(tensor: Tensor) -> Tensor:
    """Tag the storage of a tensor of the host as pinned and return the tensor."""
    _storage(tensor).pinned = True  # type: ignore[union-attr]
    return tensor


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the host, for what has no counterpart on a GPU; nothing is counted."""
    with _WithoutModes(), _disable_current_modes():
        return tensor.detach().clone()


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    # The tag is an attribute of the Python object of a storage, which torch keeps as long as the storage lives.
    if tensor.layout is not torch.strided:
        return None
    with _WithoutModes():
        return tensor.untyped_storage()


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _side(device: object) -> bool | None:
    """Return True for a CUDA device, False for the host, None if no device is named."""
    if device is None:
        return None
    if isinstance(device, int):
        return True
    assert isinstance(device, (str, torch.device))
    return torch.device(device).type == "cuda"


class _Operations(TorchDispatchMode):
    """Sees every operation below autograd: checks its tensors, counts waits, and tags what it makes."""

    def __init__(self, found: Found, collectives: Any = None) -> None:
        super().__init__()
        self.found = found
        self.collectives = collectives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return func(*args, **kwargs) if self.collectives is None else self.collectives.run(func, args, kwargs)
        given = _tensors((args, kwargs))
        device = [on_device(tensor) for tensor in given]
        name = func.overloadpacket.__name__
        if any(device):
            self._check(name, func, given, device, args)
            self._count(name, given, device, args, kwargs)
        result = func(*args, **kwargs)
        # Autograd makes zeros for gradients that are missing, on the device of what they belong to.
        of_autograd = not given and not self.found.on_host
        if any(device) or (of_autograd and _zeros_of_the_device(result)):
            inputs = {id(_storage(tensor)) for tensor in given}
            for made in _tensors(result):
                if id(_storage(made)) not in inputs:
                    put_on_device(made)
        return result

    def _check(self, name: str, func: Any, given: list[Tensor], device: list[bool], args: Any) -> None:
        if all(device) or name in _COPIES:
            return
        host = [tensor for tensor, on in zip(given, device) if not on]
        if name in _INDEXED and device[0]:
            host = [tensor for tensor in host if tensor.dtype not in (torch.int64, torch.int32, torch.bool)]
        # CUDA takes a tensor of the host only as a scalar, and never writes a result of the device into it.
        writes = func._schema.is_mutable and isinstance(args[0], Tensor) and not on_device(args[0])
        if writes or any(tensor.dim() for tensor in host):
            shapes = ", ".join(
                f"{'device' if on else 'host'} {tuple(tensor.shape)}" for tensor, on in zip(given, device)
            )
            raise DeviceError(f"{func} mixes tensors of the host and of the device: {shapes}, in {place()}")

    def _count(self, name: str, given: list[Tensor], device: list[bool], args: Any, kwargs: Any) -> None:
        if name in FREE:
            return
        if name in WAITS:
            self.found.wait(name.strip("_"))
        elif name in _INDEXED:
            index = [tensor for tensor in given[1:] if tensor.dtype in (torch.bool, torch.uint8)]
            if any(on_device(tensor) for tensor in index):
                if _fills_masked(name, args):
                    self.found.operations += 1
                else:
                    self.found.wait("boolean mask")
            elif not all(device):
                self.found.wait("upload")
            else:
                self.found.operations += 1
        elif name == "copy_" and device[0] != device[-1]:
            if not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                self.found.wait("upload" if device[0] else "download")
            elif device[0]:
                self.found.upload(given[-1])
            else:
                self.found.operations += 1
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.found.wait(name)
        else:
            self.found.operations += 1


def _zeros_of_the_device(made: object) -> bool:
    """Return whether autograd makes a tensor of its own for what is on the device, in the current pass. The number of
    `x[mask] = number` is on the host, and so is the zero that takes its place in the gradient."""
    node = torch._C._current_autograd_node()
    number = isinstance(made, Tensor) and not made.dim()
    return node is not None and not (number and node.name().startswith("IndexPut"))


def _fills_masked(name: str, args: Any) -> bool:
    """Return whether `x[mask] = number` is meant, for which torch starts the kernel of masked_fill: it need not know
    how many elements there are. Torch keeps such a number on the host."""
    if not name.lstrip("_").startswith("index_put") or (len(args) > 3 and args[3]):
        return False
    masks = [index for index in args[1] if index is not None]
    return len(masks) == 1 and args[2].numel() == 1 and not on_device(args[2])


class _Devices(TorchFunctionMode):
    """Answers questions about devices from the tags, and moves tensors between the sides."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        special = getattr(self, f"_{name}_", None)
        if special is not None:
            return special(func, args, kwargs)
        if kwargs.pop("pin_memory", False):
            return _pinned(self.__torch_function__(func, types, args, kwargs))
        if name == "new_tensor":
            kwargs.setdefault("device", args[0].device if not on_device(args[0]) else DEVICE)
        if "device" not in kwargs:
            if _tensors((args, kwargs)):
                return func(*args, **kwargs)
            with self.found.making_on_host():
                return func(*args, **kwargs)
        side = _side(kwargs.pop("device"))
        if side is None:
            return func(*args, **kwargs)
        source = _tensors((args[name == "new_tensor" :], kwargs))
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.is_meta:
            return result
        came_from = any(on_device(tensor) for tensor in source)
        if name in _FROM_PYTHON and came_from != side:
            self.found.wait("upload" if side else "download")
        if side != on_device(result):
            if any(_storage(result) is _storage(tensor) for tensor in source):
                result = result.clone()
            _storage(result).of_device = side  # type: ignore[union-attr]
        return result

    def _attribute(self, func: Any, args: Any) -> Any:
        owner, tensor = func.__self__, args[0]
        if owner is torch.Tensor.device:
            return DEVICE if on_device(tensor) else func(*args)
        if owner is torch.Tensor.is_cuda:
            return on_device(tensor)
        if owner is torch.Tensor.is_cpu:
            return not on_device(tensor)
        return func(*args)

    def _move(self, tensor: Tensor, side: bool, non_blocking: bool, **options: Any) -> Tensor:
        if on_device(tensor) == side or tensor.is_meta:
            return tensor.to(**options) if options else tensor
        if not non_blocking:
            self.found.wait("upload" if side else "download")
        elif side:
            self.found.upload(tensor)
        else:
            self.found.operations += 1
        with torch._C.DisableTorchFunctionSubclass():
            moved = tensor.to(**{"dtype": tensor.dtype, **options, "copy": True})
        _storage(moved).of_device = side  # type: ignore[union-attr]
        return moved

    def _to_(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, *rest = args
        if rest and isinstance(rest[0], Tensor) or "other" in kwargs:
            other = kwargs.pop("other", None) if not rest else rest.pop(0)
            side, dtype = on_device(other), other.dtype
        else:
            dtype, side = kwargs.pop("dtype", None), _side(kwargs.pop("device", None))
            while rest and not isinstance(rest[0], bool):
                value = rest.pop(0)
                if isinstance(value, torch.dtype):
                    dtype = value
                elif value is not None:
                    side = _side(value)
        non_blocking = bool(kwargs.pop("non_blocking", rest[0] if rest else False))
        if len(rest) > 1:
            kwargs["copy"] = rest[1]
        options = kwargs if dtype is None else {**kwargs, "dtype": dtype}
        return self._move(tensor, on_device(tensor) if side is None else side, non_blocking, **options)

    def _cuda_(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        rest = [value for value in args[1:] if isinstance(value, bool)]
        return self._move(args[0], True, bool(kwargs.get("non_blocking", rest[0] if rest else False)))

    def _cpu_(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        return self._move(args[0], False, False)

    def _pin_memory_(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if on_device(args[0]):
            raise DeviceError(f"only tensors of the host can be pinned, in {place()}")
        return _pinned(args[0].clone())

    def _is_pinned_(self, func: Any, args: Any, kwargs: Any) -> bool:
        return getattr(_storage(args[0]), "pinned", False)

    def _tolist_(self, func: Any, args: Any, kwargs: Any) -> Any:
        if on_device(args[0]):
            self.found.wait("tolist")
        with _disable_current_modes():
            return func(*args)

    def _numpy_(self, func: Any, args: Any, kwargs: Any) -> Any:
        if on_device(args[0]):
            raise DeviceError(f"numpy() of a tensor of the device, in {place()}; copy it to the host first")
        return func(*args, **kwargs)

    ___array___ = _numpy_

    def _backward_(self, func: Any, args: Any, kwargs: Any) -> None:
        kwargs["grad_tensors"] = kwargs.pop("gradient", args[1] if len(args) > 1 else None)
        with self:  # the Python parts of the backward pass ask about devices too
            _backward(args[0], **kwargs)


def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = ()
) -> None:
    """Replace torch.autograd.backward, which would leave the function mode for the whole pass."""
    roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    gradients = (grad_tensors,) if isinstance(grad_tensors, Tensor) else tuple(grad_tensors or [None] * len(roots))
    gradients = tuple(torch.ones_like(root) if one is None else one for root, one in zip(roots, gradients))
    keep = create_graph if retain_graph is None else retain_graph
    torch.autograd.graph._engine_run_backward(
        roots, gradients, keep, create_graph, tuple(inputs or ()), allow_unreachable=True, accumulate_grad=True
    )


def _record_stream(tensor: Tensor, stream: object) -> None:
    if not on_device(tensor):
        raise DeviceError(f"a stream is recorded on a tensor of the host, in {place()}")


@contextmanager
def strict_devices(collectives: Any = None) -> Iterator[Found]:
    """Follow tensors of both sides inside this block; `collectives` sees every operation of torch.distributed.

    Raises DeviceError where a GPU would refuse an operation.
    """
    found = Found()

    def synchronize(*_: Any) -> None:
        found.wait("synchronize")

    from fiberpo_megatron.mcore.cpu.patches import _NoStream

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd, "backward", _backward))
        # The objective switches function modes off for speed; here they carry the tags of new tensors.
        stack.enter_context(mock.patch.object(torch._C, "DisableTorchFunction", _Enabled))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", _record_stream))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: DEVICE))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", synchronize))
        stack.enter_context(mock.patch.object(_NoStream, "synchronize", synchronize))
        stack.enter_context(_Operations(found, collectives))
        stack.enter_context(_Devices(found))
        yield found


class _Enabled:
    """Leaves function modes as they are."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
