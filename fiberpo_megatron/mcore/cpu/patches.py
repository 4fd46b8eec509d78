"""This module holds every patch by which Megatron-Core runs without a GPU, each with its reason.

The table `PATCHES` is the whole list; `tests/mcore/test_patches.py` leaves each one out and sees what fails.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _CoalescingManager
from torch.overrides import TorchFunctionMode

Undo = Callable[[], None]


@dataclass(frozen=True)
class Patch:
    """Describes one deviation from stock torch or Megatron-Core."""

    name: str
    reason: str
    apply: Callable[[], Undo]
    """Applies the patch and returns the function that removes it again."""


_applied: dict[str, Undo] = {}


def install() -> None:
    """Apply every patch of the table, once per process."""
    for patch in PATCHES:
        if patch.name not in _applied:
            _applied[patch.name] = patch.apply()


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Leave functions that torch.compile decorates as they are while Megatron-Core is imported inside this block.

    TORCH_COMPILE_DISABLE makes torch.compile do nothing, but it still imports Inductor, which takes 2 s of every
    process's start.
    """

    def compile_(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda function: function

    undo = _replace(torch, compile=compile_)
    try:
        yield
        from megatron.core import jit

        jit.disable_jit_fuser()  # modules that are imported later read this switch
    finally:
        undo()


def leave_out(name: str) -> None:
    """Remove one patch again (for the test of the table)."""
    _applied.pop(name)()


def _replace(target: Any, **attributes: Any) -> Undo:
    before = {name: getattr(target, name) for name in attributes if hasattr(target, name)}
    for name, value in attributes.items():
        setattr(target, name, value)

    def undo() -> None:
        for name in attributes:
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)

    return undo


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class _CudaToCpu(TorchFunctionMode):
    """Answers `device="cuda"`, `.cuda()` and `.to("cuda")` with the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))


def _cuda_literals() -> Undo:
    mode = _CudaToCpu()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def _cuda_type_names() -> Undo:
    stock = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = stock(self, *args, **kwargs)
        # Under a function mode torch calls this method twice, the second time from inside `stock`.
        if not isinstance(answer, str) or answer.startswith("torch.cuda."):
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    return _replace(torch.Tensor, type=type_)


class _NoStream:
    """Replaces a CUDA stream or event on a machine that has nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> "_NoStream":
        return self

    def query(self) -> bool:
        return True

    def wait_stream(self, *args: Any) -> None:
        pass

    wait_event = wait = record = synchronize = wait_stream


def _streams() -> Undo:
    main = _NoStream()
    return _replace(
        torch.cuda,
        Stream=_NoStream,
        Event=_NoStream,
        stream=lambda *a: contextlib.nullcontext(),
        current_stream=lambda *a: main,
        default_stream=lambda *a: main,
    )


def _random_state() -> Undo:
    import megatron.core.tensor_parallel.random as random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    seed = torch.default_generator.manual_seed
    undo_torch = _replace(torch.cuda, get_rng_state=get_state, set_rng_state=set_state, manual_seed=seed)
    undo_megatron = _replace(random, _get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)
    # Megatron warns at every fork that the CPU generator moved; here it is the one that should.
    logger = logging.getLogger(random.__name__)
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    def undo() -> None:
        undo_torch()
        undo_megatron()

    return undo


def _uneven_gloo() -> Undo:
    even_gather, even_scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(outs: Any, x: Any, group: Any = None, async_op: bool = False) -> Any:
        sizes = [t.size(0) for t in outs]
        if len(set(sizes)) == 1:
            return even_gather(outs, x, group=group, async_op=async_op)
        received = x.new_empty(sum(sizes), *x.shape[1:])
        copies = torch.cat([x] * len(sizes))
        dist.all_to_all_single(received, copies, sizes, [x.size(0)] * len(sizes), group=group)
        for out, part in zip(outs, received.split(sizes)):
            out.copy_(part)
        return None

    def reduce_scatter(
        out: Any, xs: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        sizes = [t.size(0) for t in xs]
        if len(set(sizes)) == 1:
            return even_scatter(out, xs, op=op, group=group, async_op=async_op)
        received = out.new_empty(len(sizes), *out.shape)
        equal = [out.size(0)] * len(sizes)
        dist.all_to_all_single(received.flatten(0, 1), torch.cat(xs), equal, sizes, group=group)
        out.copy_(received.sum(0))
        return None

    return _replace(dist, all_gather=all_gather, reduce_scatter=reduce_scatter)


def _gather_separately() -> Undo:
    stock = vars(dist.ProcessGroup)["all_gather_single_coalesced"]  # an attribute of the class has lost its binding

    def all_gather(group: dist.ProcessGroup, outs: Any, xs: Any, options: Any) -> Any:
        together = _CoalescingManager()
        for out, x in zip(outs, xs, strict=True):
            together.append(group.all_gather_single(out, x, options))
        return together

    _replace(dist.ProcessGroup, all_gather_single_coalesced=all_gather)
    return lambda: setattr(dist.ProcessGroup, "all_gather_single_coalesced", stock)


def _recompute_without_transformer_engine() -> Undo:
    import megatron.core.tensor_parallel.random as random

    # its callers would pass None without fp8; the default (False) counts as fp8
    undo_default = _replace(random.CheckpointWithoutOutput.__init__, __defaults__=(None,))
    # 0.19 compiles a C++ function at the first backward pass, which needs a compiler and ninja
    later = {"_get_share_storage": lambda: _copy_storage} if hasattr(random, "_get_share_storage") else {}
    undo_storage = _replace(random, **later)

    def undo() -> None:
        undo_default()
        undo_storage()

    return undo


def _copy_storage(target: torch.Tensor, source: torch.Tensor) -> None:
    """Give a tensor, and all views of it, the bytes of another one."""
    storage, wanted = target.untyped_storage(), source.untyped_storage()
    storage.resize_(wanted.nbytes())
    storage.copy_(wanted)


def _dispatcher_splits() -> Undo:
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    move = dispatcher.maybe_move_tensor_to_cpu

    def to_numbers(x: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return x.numpy() if as_numpy and torch.is_tensor(x) else move(x, as_numpy, record_stream)

    return _replace(dispatcher, maybe_move_tensor_to_cpu=to_numbers)


def _router_without_transformer_engine() -> Undo:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    return _replace(moe_utils, te_general_gemm=getattr(moe_utils, "te_general_gemm", None))


def _latent_attention_without_transformer_engine() -> Undo:
    import megatron.core.transformer.multi_latent_attention as latent
    from megatron.core.post_training.modelopt.layers import Linear

    return _replace(latent, HAVE_TE=False, Linear=Linear)


PATCHES: tuple[Patch, ...] = (
    Patch(
        "current_device",
        "embeddings, linear layers and buffers are allocated on torch.cuda.current_device()",
        lambda: _replace(torch.cuda, current_device=lambda: torch.device("cpu")),
    ),
    Patch(
        "cuda_literals",
        'Megatron\'s code has device="cuda" and .cuda() in places that no setting changes',
        _cuda_literals,
    ),
    Patch(
        "cuda_type_names",
        "the mixed-precision and distributed optimizers compare Tensor.type() with the names of CUDA tensors",
        _cuda_type_names,
    ),
    Patch(
        "random_state",
        "the tensor-parallel random number tracker forks the CUDA generator; here it forks the CPU one",
        _random_state,
    ),
    Patch(
        "streams",
        "the MoE token dispatcher copies its counts on a side stream and waits for events",
        _streams,
    ),
    Patch(
        "synchronize",
        "the exchange of shapes between pipeline stages ends with torch.cuda.synchronize()",
        lambda: _replace(torch.cuda, synchronize=lambda *a: None),
    ),
    Patch(
        "router_without_transformer_engine",
        "0.16.1 leaves te_general_gemm undefined where Transformer Engine is absent, and the router asks for it",
        _router_without_transformer_engine,
    ),
    Patch(
        "recompute_without_transformer_engine",
        "selective recompute asks Transformer Engine for its fp8 state although nothing is in fp8",
        _recompute_without_transformer_engine,
    ),
    Patch(
        "latent_attention_without_transformer_engine",
        "0.16.1 treats its stand-in for Transformer Engine's linear layer as a class, and later versions leave the "
        "plain one undefined",
        _latent_attention_without_transformer_engine,
    ),
    Patch(
        "dispatcher_splits",
        "split sizes of the MoE all-to-all become Python numbers only when they come from a GPU",
        _dispatcher_splits,
    ),
    Patch(
        "uneven_gloo",
        "gloo has no all-gather or reduce-scatter of unequal parts; experts with tensor parallelism need them",
        _uneven_gloo,
    ),
    Patch(
        "gather_separately",
        "gloo of torch 2.13 corrupts the heap when several coalesced all-gathers are in flight, as those of "
        "overlap_param_gather are; the same tensors one by one do no harm",
        _gather_separately,
    ),
)
