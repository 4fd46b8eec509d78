"""Training steps mix no tensors of host and device, and the host waits for the device no more often than stated."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fiberpo_megatron.certify.processes import run_ranks
from tests.gpu_ready.strict_run import Steps, training_steps
from tests.variations import varied
from tools.strict_devices import DEVICE, DeviceError, Found, on_device, strict_devices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU needs no stand-in")

REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "add": lambda device, host: device + host,
    "cat": lambda device, host: torch.cat([device, host]),
    "product": lambda device, host: device[None] @ host[:, None],
    "rows by index of the host": lambda device, host: device.index_select(0, host.long()),
    "a scalar of the device in a tensor of the host": lambda device, host: host + device[0],
    "in place": lambda device, host: host[0].add_(device[0]),
    "host indexed by the device": lambda device, host: host[device.long()],
    "numpy": lambda device, host: device.numpy(),
    "array": lambda device, host: np.asarray(device),
    "gradient": lambda device, host: (device.requires_grad_().exp() * host).sum().backward(),
}
ALLOWED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "scalar of the host": lambda device, host: device * host[0],
    "copy": lambda device, host: device.copy_(host, non_blocking=True),
    "like": lambda device, host: torch.zeros_like(device) + device.new_ones(3),
    "made there": lambda device, host: torch.arange(3, device=device.device) + device,
    "moved without waiting": lambda device, host: host.to("cuda", non_blocking=True) + device,
    "moved by another tensor": lambda device, host: host.to(device, non_blocking=True) + device,
    "both on the host": lambda device, host: (host + host)[host.long()].tolist(),
    "masked without waiting": lambda device, host: torch.where(device > 0, device, 0).masked_fill(device > 1, 0),
    "a number where a mask holds": lambda device, host: device.index_put_((device > 0,), host[0]),
    "its gradient": lambda device, host: (
        (device.requires_grad_() * 2).index_put_((device > 0,), torch.tensor(0.0)).sum().backward()
    ),
    "gradient": lambda device, host: (device.requires_grad_().exp() * host[0]).sum().backward(),
}
WAITED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "local_scalar_dense": lambda device, host: float(device[0]),
    "tolist": lambda device, host: device.tolist(),
    "download": lambda device, host: device.cpu(),
    "nonzero": lambda device, host: device.nonzero(),
    "boolean mask": lambda device, host: device[device > 0],
    "masked_select": lambda device, host: device.masked_select(device > 0),
    "unique2": lambda device, host: device.unique(),
    "repeat_interleave": lambda device, host: device.repeat_interleave(device.long()),
    "upload": lambda device, host: host.to("cuda"),
    "synchronize": lambda device, host: torch.cuda.synchronize(),
}


def both() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(3, device="cuda"), torch.ones(3)


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_a_gpu_refuses_is_refused(name: str):
    with strict_devices(), pytest.raises(DeviceError):
        REFUSED[name](*both())


@pytest.mark.parametrize("name", list(ALLOWED))
def test_what_a_gpu_allows_costs_no_wait(name: str):
    with strict_devices() as found:
        ALLOWED[name](*both())
    assert not found.waits, found.table()


@pytest.mark.parametrize("kind", list(WAITED))
def test_every_wait_is_counted_once_with_its_place(kind: str):
    with strict_devices() as found:
        WAITED[kind](*both())
    (((counted, place), times),) = found.waits.items()
    assert (counted, times) == (kind, 1)
    assert place.startswith("gpu_ready/test_devices.py:")


def test_values_of_the_device_where_a_mask_holds_are_waited_for():
    """A single number is filled in (above); several values have to be counted off."""
    with strict_devices() as found:
        device, _ = both()
        device[device > 0] = device + 1
    assert [kind for kind, _ in found.waits] == ["boolean mask"]


def test_uploads_of_python_data_are_waited_for():
    with strict_devices() as found:
        device = torch.tensor([1.0, 2.0], device=DEVICE)
        made = [torch.as_tensor([1, 0], device="cuda"), device.new_tensor([1]), device[[1, 0]]]
    assert found.waits.total() == 4
    assert all(on_device(tensor) for tensor in made)


def test_tensors_say_where_they_are():
    with strict_devices():
        device, host = both()
        assert (device.device, device.is_cuda, host.is_cuda) == (DEVICE, True, False)
        assert device.view(3, 1).device == device.exp().device == DEVICE
        assert device.to("cpu").device == host.device == torch.device("cpu")
        assert host.cuda()[1:].is_cuda


def test_what_a_recomputed_layer_makes_on_the_host_is_there():
    """Autograd itself makes tensors out of nothing in a backward pass, which are on the device."""
    found_on_host: list[bool] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(3, 2, dtype=torch.uint8, pin_memory=True)
        torch.index_select(torch.ones(5, 2, dtype=torch.uint8), 0, torch.tensor([0, 1, 4]), out=rows)
        found_on_host.append(not on_device(rows))
        return x * rows.to("cuda", non_blocking=True).sum()

    with strict_devices():
        device, _ = both()
        checkpoint(layer, device.requires_grad_(), use_reentrant=True).sum().backward()
    assert found_on_host == [True, True]
    assert device.grad is not None and on_device(device.grad)


PER_STEP = 11
PER_MICRO_BATCH = 0
PER_PASS = 1
"""Most waits of the host in a training step with a pass for old log-probs and an optimiser step in one pass: for the
whole step, for each micro-batch, and for each forward pass of a micro-batch through a layer with experts. There the
dispatcher of tokens waits for the number of tokens that each expert gets."""
ONLY_ON_CPU = {
    "moe/moe_utils.py permute": "Transformer Engine permutes tokens with a kernel of its own",
    "core/utils.py local_multi_tensor_l2_norm": "Transformer Engine or apex computes the norm",
    "distributed/param_and_grad_buffer.py start_grad_sync": "gloo reduces in a buffer of its own and copies",
    "tensor_parallel/mappings.py _reduce_scatter_along_first_dim": "the same",
    "tensor_parallel/layers.py backward": "the same",
    "embeddings/rope_utils.py _apply_rotary_pos_emb_thd": "kernels rotate, except for odd sizes of latent attention",
}
"""Places that a GPU does not run, and what runs there instead."""
OF_THE_OBJECTIVE = "fibration/"
"""The objective's torch path waits often, and runs on a GPU only without Triton; its kernels' waits are counted in
tests/fibration/test_kernels.py."""


def counted(waits: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The waits of a GPU, without the objective's."""
    return {
        (kind, place): count
        for (kind, place), count in waits.items()
        if not place.startswith(OF_THE_OBJECTIVE) and re.sub(r":\d+", "", place) not in ONLY_ON_CPU
    }


def forward_passes(case: Steps) -> int:
    """The passes of micro-batches through a layer: for the old log-probs, in the optimiser step and, with full
    recomputation, once more. Without a pipeline the step goes on from one that the old log-probs have kept."""
    kept = 1 if case.parallel.get("pipeline", 1) == 1 else 0
    return (2 + ("recompute" in case.options)) * case.micro_batches - kept


def shares(case: Steps, base: int, deeper: int, longer: int) -> tuple[float, float, float]:
    """(waits of a step, of a micro-batch, of a pass through a layer) from those of a case, of the same with two layers
    more, and of the same with two micro-batches more."""
    of_pass = (deeper - base) / (2 * forward_passes(case))
    more = forward_passes(replace(case, micro_batches=case.micro_batches + 2)) - forward_passes(case)
    of_micro_batch = (longer - base - more * of_pass * case.layers) / 2
    rest = base - case.micro_batches * of_micro_batch - forward_passes(case) * of_pass * case.layers
    return rest, of_micro_batch, of_pass


KINDS = {
    "old": Steps(),
    "rollout": Steps(replay="rollout"),
    "none": Steps(replay="none"),
    "recomputed": Steps(options={"recompute": "full"}),
}


@pytest.mark.parametrize("kind", varied(KINDS, ["old"]))
def test_waits_of_a_training_step(kind: str):
    case = KINDS[kind]
    cases = [case, replace(case, layers=4), replace(case, micro_batches=4)]
    assert (case.layers, case.micro_batches) == (2, 2)
    (found,) = run_ranks(1, training_steps, *cases, timeout_s=250)
    of_step, of_micro_batch, of_pass = shares(case, *(sum(counted(one.waits).values()) for one, _ in found))
    table = "\n".join(f"{count:5d} {place}" for place, count in sorted(counted(found[1][0].waits).items()))
    print(f"waits: {of_step} a step, {of_micro_batch} a micro-batch, {of_pass} a pass through a layer\n{table}")
    assert of_step <= PER_STEP, table
    assert of_micro_batch <= PER_MICRO_BATCH, table
    assert of_pass <= PER_PASS, table
    assert_copied_ahead(found[0][0])


def assert_copied_ahead(found: Found) -> None:
    """The ids of a row travel as int32, and all that a row needs out of pinned memory, so that nothing waits."""
    ours = [(kind, pinned, place) for kind, pinned, place in found.uploads if place.startswith("mcore/")]
    assert {kind for kind, _, _ in ours} == {"int32", "bool", "uint8"}, ours
    assert all(pinned for _, pinned, _ in ours), ours
