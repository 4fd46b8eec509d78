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
from fiberpo_megatron.fibration.kernels import device_tree, fused, run_kernels, run_plan
from fiberpo_megatron.fibration.kernels.launch import OPTIONS
from tests.fibration.oracle import random_case

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}


def type_of(value: Any) -> Any:
    """An argument's type in a kernel's signature."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, tuple):  # Triton makes a one in a tuple a constant
        return tuple("constexpr" if isinstance(part, int) and part == 1 else type_of(part) for part in value)
    return "constexpr" if value is None else "i32"


def compiled(
    name: str, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options
) -> dict[str, Any]:
    """The kernels of one call, by name, compiled for the types of the arguments they are called with."""
    done: dict[str, Any] = {}

    def compile_one(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments)) | constants
        assert set(given) == set(kernel.arg_names)
        types = {key: "constexpr" if key in constants else type_of(value) for key, value in given.items()}
        fixed: dict[Any, Any] = {key: given[key] for key, kind in types.items() if kind == "constexpr"}
        for place, key in enumerate(kernel.arg_names):
            if isinstance(types[key], tuple):
                fixed |= {(place, i): 1 for i, kind in enumerate(types[key]) if kind == "constexpr"}
        source = ASTSource(kernel, {key: types[key] for key in kernel.arg_names}, fixed)
        done[kernel.__name__] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(OPTIONS))
        if kernel is run_kernels.find_cuts:
            given["found_ptr"][:2] = 1  # one run, as if out of order; no kernel runs here

    for module in (fused, run_plan, device_tree):
        monkeypatch.setattr(module, "launch", compile_one)
    monkeypatch.setattr(fused, "why_not", lambda *_: None)
    monkeypatch.setattr(fused._FusedCall, "finish", lambda *_: (None, None))
    case = random_case(0, partitions=8)
    case.x = case.x.to(dtype)
    counts = {key: int(ids.max()) + 1 for key, ids in case.ids.items()}
    case.call(build_objective(name, kernels=True, **options), counts=counts, reduce=lambda flat: flat)
    return done


BY_NODE = {
    "trajectory+expert": {"by": "expert", "*": (0.2, 0.1), 1: (0.1, 0.08)},
    "trajectory": {"by": "domain", "*": (0.2, 0.1), 1: (0.1, 0.08)},
    "prompt_group": (0.2, 0.1),
    "domain": {"*": (0.2, 0.1), 1: (0.1, 0.08)},
}
RUNS = {"find_cuts", "write_runs"}
TOKENS = {"first_pass", "second_pass", "place_maximum", "sum_programs", "decode_sums"}
ADJOINTS = {"sum_runs", "third_pass"}
NODES = {"gate_nodes", "adjoin_nodes"}
COARSE = {"place_nodes", "sum_up", "report_parents"}


FURTHER: list[tuple[str, int, torch.dtype, dict[str, Any]]] = [
    ("fiberpo-expert", 90, torch.float32, {}),
    ("fiberpo-expert", 80, torch.float32, {"expert_membership": "hard", "unclip_positive": True}),
    ("fiberpo", 80, torch.float32, {"pessimistic": True, "dual_clip": 3.0, "k_max": 8}),
    ("fiberpo-expert", 90, torch.float32, {"budgets": BY_NODE}),
    ("gspo", 90, torch.float32, {}),
    ("apc", 80, torch.float32, {}),
    ("tests.fibration.topr_kernel:FusedTOPR", 90, torch.float32, {}),
]


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "options"),
    [
        ("fiberpo", 90, torch.float64, {"dual_clip": 2.0}),
        ("fiberpo-expert", 80, torch.float32, {"budgets": BY_NODE}),
        ("dapo", 90, torch.float32, {}),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in FURTHER),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kernels_compile(name: str, capability: int, dtype: torch.dtype, options: dict, monkeypatch) -> None:
    done = compiled(name, capability, dtype, monkeypatch, **options)
    expected = RUNS | TOKENS
    if name == "gspo":
        expected |= {"sum_runs"}
    elif name not in ("dapo", "tests.fibration.topr_kernel:FusedTOPR"):
        expected |= ADJOINTS
    if name.startswith("fiberpo"):
        expected |= NODES | {"find_largest"}
    if name.startswith("fiberpo-"):
        expected |= COARSE
    assert set(done) == expected
    for kernel in done.values():
        assert kernel.asm["cubin"]
        added = re.findall(r"(?:atom|red)\.[\w.:]*add\.(?:\w+\.)*([a-z]+)\d+", kernel.asm["ptx"])
        assert set(added) <= {"s", "u"}, "floats added atomically: the order of the sum would vary"
    assert re.search(r"(?:atom|red)\.[\w.:]*add\.", done["first_pass"].asm["ptx"])  # the histogram's integers
