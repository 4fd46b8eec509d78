"""A resumed run goes on as if it had not stopped, in the same layout and in others."""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import FileSystemWriter

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore import checkpoint
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout, start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from tests.distributed.parity import (
    MODELS,
    TEMPERATURE,
    Piece,
    assemble,
    fixed_gate,
    global_shards,
    make_batch,
    make_config,
    micro_batches_for,
    pieces,
)
from tests.variations import varied

STATE = {"step": 2, "prompts": [3, 1], "text": "ü"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "EP2": (2, {"expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2xEP2": (4, {"tensor": 2, "expert": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "EP4": (4, {"expert": 4}),
}


@dataclass
class Case:
    """A run that is saved after two steps, and the same run resumed."""

    saved: str
    resumed: str
    tolerance: float = 0.0
    """Largest difference of a parameter after the next step, which is of order 1e-2: 0 where sums keep their
    order, else float32 rounding."""
    sections: dict[str, Any] = field(default_factory=dict)
    background: bool = False
    """Whether training goes on while the checkpoint is written."""
    model: str = "moe"
    """Key of MODELS."""
    exhaustive: bool = False
    """Whether only `make test-all` runs it."""


BF16 = {"model": {"dtype": "bfloat16"}}
PLAIN = {"parallel": {"distributed_optimizer": False}}
OVERLAPPED = {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
BALANCED = {"model": {"router_bias_update_rate": 0.01}}
"""The routers' correction bias moves, so that it has to be saved: a buffer, which no optimizer knows."""
CASES = [
    Case("EP2", "EP2"),
    Case("VPP2", "VPP2"),
    Case("TP2", "EP2", 1e-6),
    Case("1", "PP2", 1e-6, exhaustive=True),
    Case("TP2xEP2", "DP2", 1e-6, exhaustive=True),
    Case("EP2", "EP2", sections=BF16),
    Case("TP2", "TP2", sections=PLAIN),
    Case("EP2", "EP2", sections=OVERLAPPED, exhaustive=True),
    Case("EP2", "TP2", 1e-6, PLAIN, exhaustive=True),
    Case("TP2xPP2", "EP4", 1e-6, BALANCED, model="deepseek"),
    Case("1", "TP2xPP2", 1e-6, exhaustive=True),
    Case("DP2", "EP2", 1e-6, exhaustive=True),
    Case("EP2", "EP2", sections=BALANCED, background=True, model="deepseek"),
    Case("TP2", "TP2", sections=PLAIN, background=True, exhaustive=True),
    Case("VPP2", "1", 1e-6, background=True),
]


@dataclass
class Outcome:
    """One rank after its last step."""

    parameters: list[Piece]
    rates: list[float]
    """Learning rate of each step."""
    draws: list[float]
    """One number of every random generator."""


def draws() -> list[float]:
    with get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return [random.random(), float(np.random.rand()), float(torch.rand(())), tracked]


def configured(name: str, sections: dict[str, Any]) -> Config:
    merged = {**sections, "parallel": {**LAYOUTS[name][1], **sections.get("parallel", {})}}
    merged["optimizer"] = {"learning_rate": 1e-2, "eps": 1e-2, "schedule": "linear", "warmup_steps": 2}
    return make_config(**merged)


def start(config: Config, layout: ParallelLayout, model: str) -> tuple[MegatronPolicy, Callable[[], float]]:
    """A fresh policy, and what takes one step and returns its learning rate."""
    policy = build_policy(config, MODELS[model], layout, total_steps=10)
    batch = make_batch()
    micro_batches = micro_batches_for(batch, layout, 64)
    gate = fixed_gate(micro_batches, len(batch.tokens))
    return policy, lambda: policy.step(micro_batches, gate, TEMPERATURE).learning_rate


def uninterrupted(
    config: Config, layout: ParallelLayout, model: str, folder: Path, background: bool = False
) -> Outcome:
    """Two steps, a save, one more step."""
    policy, step = start(config, layout, model)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + policy.layout.rank)
    step(), step(), draws()
    if not background:
        policy.save(str(folder), STATE)
        rates = [step()]
        policy.gather.finish()
        return Outcome(pieces(global_shards(policy.models)), rates, draws())
    stepped, write_data = threading.Event(), FileSystemWriter.write_data

    def write_afterwards(*args: Any) -> Any:
        assert stepped.wait(timeout=100)
        return write_data(*args)

    FileSystemWriter.write_data = write_afterwards  # type: ignore[method-assign]
    pending = policy.begin_save(str(folder), STATE)
    rates = [step()]
    stepped.set()
    pending.finish()  # what was saved is the state before that step
    policy.gather.finish()
    return Outcome(pieces(global_shards(policy.models)), rates, draws())


def resumed(config: Config, layout: ParallelLayout, model: str, folder: Path) -> Outcome:
    """A load into a policy that has gone elsewhere, and one step."""
    policy, step = start(config, layout, model)
    step()
    state = policy.load(str(folder))
    assert state == STATE
    rates = [step()]
    policy.gather.finish()
    return Outcome(pieces(global_shards(policy.models)), rates, draws())


def run_parts(config: Config, model: str, folder: Path, parts: Sequence[Callable[..., Outcome]]) -> list[Outcome]:
    """One rank of one layout."""
    layout = start_layout(MODELS[model], config.parallel, config.run)
    return [part(config, layout, model, folder) for part in parts]


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Over the rows that both layouts have: they pad the vocabulary differently."""
    assert a.keys() == b.keys()
    common = {key: tuple(slice(0, min(m, n)) for m, n in zip(a[key].shape, b[key].shape)) for key in a}
    return float(max(np.abs(a[key][at] - b[key][at]).max() for key, at in common.items()))


@pytest.mark.parametrize(
    "case",
    varied(CASES, [case for case in CASES if not case.exhaustive]),
    ids=lambda case: (
        f"{case.saved} to {case.resumed}{' background' * case.background} {case.model} {case.sections or ''}"
    ),
)
def test_the_next_step_is_the_same(case: Case, tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 2)
    ranks = LAYOUTS[case.saved][0]
    first = partial(uninterrupted, background=case.background)
    config = configured(case.saved, case.sections)
    if case.saved == case.resumed:
        before, after = zip(*run_ranks(ranks, run_parts, config, case.model, folder, [first, resumed]))
    else:
        other = configured(case.resumed, case.sections)
        [before] = zip(*run_ranks(ranks, run_parts, config, case.model, folder, [first]))
        [after] = zip(*run_ranks(LAYOUTS[case.resumed][0], run_parts, other, case.model, folder, [resumed]))
    assert checkpoint.latest(tmp_path) == folder
    difference = largest_difference(
        assemble(outcome.parameters for outcome in before), assemble(outcome.parameters for outcome in after)
    )
    assert difference <= case.tolerance
    assert before[0].rates == after[0].rates
    if case.saved == case.resumed:
        assert [outcome.draws for outcome in before] == [outcome.draws for outcome in after]
        assert len({outcome.draws[0] for outcome in before}) == len(before)
