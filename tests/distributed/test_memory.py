"""Options that save memory change nothing else: released and restored, recomputed, bfloat16 with float32 masters."""

import gc
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.config import Config
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout, start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from fiberpo_megatron.mcore.weights.global_tensors import global_shards
from tests.distributed.parity import (
    QWEN3_MOE,
    TEMPERATURE,
    coupled_gate,
    make_batch,
    make_config,
    micro_batches_for,
    pieces,
)

PARALLEL = {"data": 2, "expert": 2}
OPTIMIZERS = (
    # type of the parameters, distributed optimizer, CPU offload
    ("float32", False, False),
    ("float32", True, True),
    ("bfloat16", True, False),
    ("bfloat16", False, True),
)


def live_bytes() -> int:
    """Bytes of every distinct storage in this process, found without the code under test."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def optimised_share(policy: MegatronPolicy, distributed: bool) -> tuple[int, int]:
    """Trained parameters of this rank, and those whose optimizer state it holds (experts have no replica here)."""
    parameters = [p for model in policy.models for p in model.parameters() if p.requires_grad]
    mine = [p.numel() // (2 if distributed and getattr(p, "allreduce", True) else 1) for p in parameters]
    return sum(p.numel() for p in parameters), sum(mine)


def three_steps(config: Config, layout: ParallelLayout, release: bool) -> dict[str, Any]:
    """Before the first and the last step, the memory is released, the policy used, and the memory restored."""
    policy, batches = build_policy(config, QWEN3_MOE, layout), micro_batches_for(make_batch(), layout, 144)
    gate = coupled_gate(batches, len(make_batch().tokens), layout)
    seen, sizes = [], []
    for step in range(3):
        if step % 2 == 0:
            before = live_bytes(), policy.memory.device_bytes()
            if release:
                policy.release_memory()
                policy.release_memory()  # once more changes nothing
                sizes.append((*before, live_bytes(), policy.memory.device_bytes()))
                for action in (
                    lambda: policy.step(batches, gate, TEMPERATURE),
                    lambda: policy.save("nowhere", {}),
                    lambda: policy.begin_save("nowhere", {}),
                ):
                    with pytest.raises(RuntimeError, match=r"call restore_memory\(\) first"):
                        action()
            seen.append(policy.log_probs(batches, TEMPERATURE).log_probs.tolist())
            seen.append(sum(float(tensor.double().sum()) for _, tensor in policy.weights.full()))
            if release:
                policy.restore_memory()
                policy.restore_memory()
                assert policy.memory.device_bytes() == before[1]
        seen.append(policy.step(batches, gate, TEMPERATURE).gradient_norm)
    trained, optimised = optimised_share(policy, config.parallel.distributed_optimizer)
    return {
        "seen": seen,
        "parameters": [(key, data) for key, _, _, data in pieces(global_shards(policy.models))],
        "sizes": sizes,
        "gradients": 4 * trained,
        "state": (4 * optimised if config.model.dtype == "bfloat16" else 0, 8 * optimised),
    }


def all_optimizers() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(released, neither released nor offloaded) for each kind of optimizer."""
    layout = start_layout(QWEN3_MOE, make_config(parallel=PARALLEL).parallel, make_config().run)
    found = []
    for dtype, distributed, offload in OPTIMIZERS:
        options = {"parallel": {**PARALLEL, "distributed_optimizer": distributed}, "model": {"dtype": dtype}}
        released = three_steps(make_config(**options, optimizer={"cpu_offload": offload}), layout, True)
        found.append((released, three_steps(make_config(**options), layout, False)))
    return found


def test_released_and_offloaded_memory_is_free_and_comes_back_bitwise():
    for rank in run_ranks(2, all_optimizers):
        for (ours, theirs), (_, _, offload) in zip(rank, OPTIMIZERS, strict=True):
            assert ours["seen"] == theirs["seen"]
            for (key, mine), (_, other) in zip(ours["parameters"], theirs["parameters"], strict=True):
                assert (mine == other).all(), key
            masters, moments = (0, 0) if offload else ours["state"]  # moments exist from the first step on
            for (live, held_before, live_released, held_released), more in zip(ours["sizes"], (0, moments)):
                assert held_before == pytest.approx(ours["gradients"] + masters + more, rel=0.02)  # buffers are padded
                assert held_released == 0
                # On a CPU the parked state is live as well: what is really freed is the gradients.
                assert live - live_released == pytest.approx(ours["gradients"], rel=0.02)


def three_plain_steps(config: Config, layout: ParallelLayout) -> dict[str, Any]:
    policy, batches = build_policy(config, QWEN3_MOE, layout), micro_batches_for(make_batch(), layout, 144)
    before = {key: data for key, _, _, data in pieces(global_shards(policy.models))}
    gate = coupled_gate(batches, len(make_batch().tokens), layout)
    norms = [policy.step(batches, gate, TEMPERATURE).gradient_norm for _ in range(3)]
    buffers = [b for chunk in policy.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    return {
        "norms": norms,
        "moves": {key: data - before[key] for key, _, _, data in pieces(global_shards(policy.models))},
        "gradients": {str(buffer.grad_data.dtype) for buffer in buffers},
        "parameters": {str(p.dtype) for model in policy.models for p in model.parameters()},
        "masters": {str(p.dtype) for group in policy.optimizer.param_groups for p in group["params"]},
    }


def both_types() -> tuple[dict[str, Any], dict[str, Any]]:
    layout = start_layout(QWEN3_MOE, make_config(parallel=PARALLEL).parallel, make_config().run)
    found = [
        three_plain_steps(make_config(parallel=PARALLEL, model={"dtype": dtype}), layout)
        for dtype in ("bfloat16", "float32")
    ]
    return found[0], found[1]


def test_bfloat16_parameters_with_float32_gradients_and_masters_stay_close_to_float32():
    for low, full in run_ranks(2, both_types):
        assert low["parameters"] == {"torch.bfloat16"}
        assert low["gradients"] == low["masters"] == {"torch.float32"}
        # bfloat16 keeps 8 bits: rounding of 2^-9 in every product, and experts that change where routers nearly tie
        assert low["norms"] == pytest.approx(full["norms"], rel=0.1)
        ours, theirs = (np.concatenate([x.ravel() for x in run["moves"].values()]) for run in (low, full))
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)

        assert cosine > 0.95
