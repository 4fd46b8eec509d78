"""The fused kernels compile for GPUs as they are launched: Triton's compiler needs no GPU.

Run by test_kernels.py in a process of its own with Triton on the path.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.fibration.engine import _Call
from fiberpo_megatron.fibration.kernels import blocks
from fiberpo_megatron.fibration.kernels.fused import FusedPasses
from fiberpo_megatron.fibration.tokens import make_batch
from tests.fibration.oracle import random_case

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}


class Compiled:
    """Stands for a kernel: compiles it for `target` with the types of the arguments it is called with."""

    def __init__(self, kernel: triton.JITFunction, target: GPUTarget, done: dict[str, Any]) -> None:
        self.kernel, self.target, self.done = kernel, target, done

    def __getitem__(self, grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        given = dict(zip(self.kernel.arg_names, arguments)) | constants
        assert set(given) == set(self.kernel.arg_names)
        types = dict.fromkeys(self.kernel.arg_names, "constexpr")
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                types[name] = TYPES[value.dtype]
            elif name not in constants and value is not None:
                types[name] = "i32"
        fixed = {name: given[name] for name, kind in types.items() if kind == "constexpr"}
        source = ASTSource(self.kernel, types, fixed)
        self.done[self.kernel.__name__] = triton.compile(source, target=self.target)


def compiled(
    name: str, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options
) -> dict[str, Any]:
    """The kernels of one call, by name."""
    done: dict[str, Any] = {}
    for kernel in ("first_pass", "second_pass", "third_pass", "sum_runs"):
        monkeypatch.setattr(blocks, kernel, Compiled(getattr(blocks, kernel), GPUTarget("cuda", capability, 32), done))
    monkeypatch.setattr("fiberpo_megatron.fibration.engine.choose_passes", lambda *_: FusedPasses)
    objective = build_objective(name, **options)
    case = random_case(0, partitions=8)
    keys = {key: case.ids[key] for key in {*objective.keys, "trajectory"}}
    share = case.share if objective.uses_experts else None
    batch = make_batch(case.x.to(dtype), case.advantages, case.weights, keys=keys, counts=None, expert_share=share)
    call = _Call(objective._rule, batch, None, with_metrics=True, kernels=None)
    gating, _ = call.first_pass()  # the sums stay zero: no kernel runs
    gated, _ = call.second_pass(gating)
    if gating.node_values is not None:
        call.passes.third(gating, gating.node_values[:2], gated.gradient)
    return done


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "options"),
    [
        ("fiberpo", 90, torch.float64, {"dual_clip": 2.0}),
        ("fiberpo-expert", 90, torch.float32, {}),
        ("fiberpo-expert", 80, torch.float32, {"expert_membership": "hard", "unclip_positive": True}),
        ("gspo", 90, torch.float32, {}),
        ("dapo", 90, torch.float32, {}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kernels_compile(name: str, capability: int, dtype: torch.dtype, options: dict, monkeypatch) -> None:
    done = compiled(name, capability, dtype, monkeypatch, **options)
    expected = {"first_pass", "second_pass", "third_pass", "sum_runs"}
    assert set(done) == (expected if name != "dapo" else {"first_pass", "second_pass"})
    for kernel in done.values():
        assert kernel.asm["cubin"]
        added = re.findall(r"(?:atom|red)\.[\w.:]*add\.(?:\w+\.)*([a-z]+)\d+", kernel.asm["ptx"])
        assert set(added) <= {"s", "u"}, "floats added atomically: the order of the sum would vary"
    assert re.search(r"(?:atom|red)\.[\w.:]*add\.", done["first_pass"].asm["ptx"])  # the histogram's integers
