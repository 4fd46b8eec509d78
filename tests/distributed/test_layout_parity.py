"""Objective coefficients and parameter gradients of real layouts against one float64 process, for every objective."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.certify.training_step import Case, Outcome, compare, run_rank, run_reference
from tests.variations import varied
from tools import layout_parity

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
"""float32 against float64: rounding of log-probs moves coefficients by about 1e-6 of the largest."""

LAYOUTS = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"expert": 2, "data": 2},
    "CP2": {"context": 2},
    "DP2": {"data": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "PP2 EP2": {"pipeline": 2, "expert": 2, "data": 2},
    "DP2 EP2": {"expert": 2, "data": 4},
}


def case(objective: str, budget: int, terms: str = "", branches: bool = False, **sizes: int) -> Case:
    words = [f"--{name}={size}" for name, size in sizes.items()] + ["--branches"] * branches
    return layout_parity.case_of(
        [f"--objective={objective}", f"--micro-batch-tokens={budget}", "--seed=1", f"--terms={terms}", *words]
    )


@cache
def reference(objective: str, terms: str = "", branches: bool = False) -> Outcome:
    (outcome,) = run_ranks(1, run_reference, case(objective, 1, terms, branches))
    return outcome


def assert_parity(objective: str, budget: int, terms: str = "", branches: bool = False, **sizes: int) -> None:
    tried = case(objective, budget, terms, branches, **sizes)
    wanted = reference(objective, terms, branches)
    old = dict(zip(wanted.index.tolist(), wanted.old_log_probs.tolist()))
    outcomes = [outcome for (outcome,) in run_ranks(tried.ranks, run_rank, tried, old, (budget,))]
    found, worst = compare(wanted, outcomes)
    assert all(0 < one.relative < TOLERANCE for one in found.values()), (found, worst)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_in_two_passes(name: str):
    assert_parity("fiberpo-expert", 96, **LAYOUTS[name])


@pytest.mark.parametrize("name", varied(LAYOUTS, ("TP2", "CP2", "PP2 EP2")))
def test_every_layout_in_a_single_pass(name: str):
    """One micro-batch at a time, except under context parallelism, which cuts trajectories."""
    assert_parity("fiberpo", 96, **LAYOUTS[name])


@pytest.mark.parametrize("budget", [1, 100_000], ids=["one trajectory", "all trajectories"])
@pytest.mark.parametrize("name", varied(["PP2", "CP2"], ["CP2"]))
def test_every_micro_batch_size(name: str, budget: int):
    assert_parity("fiberpo-domain", budget, **LAYOUTS[name])


@pytest.mark.parametrize(
    "objective",
    varied(
        ["fiberpo-expert-global", "gspo", "apc", "apc-trajectory", "dapo", "cispo"], ["fiberpo-expert-global", "apc"]
    ),
)
def test_other_objectives(objective: str):
    assert_parity(objective, 96, **LAYOUTS["PP2 EP2"])


ALL_TERMS = "kl,entropy,distillation,off_policy_mask,supervised"
WITH_TERMS = {
    "TP2": ("fiberpo-expert", ALL_TERMS),
    "PP2": ("dapo", "kl=k1,kl.where=reward,entropy"),
    "EP2": ("grpo", "off_policy_mask,supervised,distillation"),
    "CP2": ("gspo", ALL_TERMS),
    "DP2": ("fiberpo", "kl,entropy"),
    "TP2 PP2": ("grpo", "kl=k2,entropy"),
    "PP2 EP2": ("fiberpo-domain", ALL_TERMS),
    "DP2 EP2": ("cispo", "kl=k3,entropy,supervised"),
}


@pytest.mark.parametrize("name", varied(WITH_TERMS, ["TP2"]))
def test_every_layout_with_terms(name: str):
    objective, terms = WITH_TERMS[name]
    assert_parity(objective, 96, terms, **LAYOUTS[name])


WITH_BRANCHES = {
    "TP2": ("fiberpo", 64),
    "PP2": ("grpo", 64),
    "EP2": ("fiberpo-expert", 64),
    "CP2": ("gspo", 64),
    "DP2": ("fiberpo", 512),
    "TP2 PP2": ("fiberpo-domain", 64),
    "PP2 EP2": ("apc", 64),
    "DP2 EP2": ("fiberpo", 64),
}
"""Objective, and positions of a row: with 512 all branches of a trajectory are in one, and a single pass is right."""


@pytest.mark.parametrize("name", varied(WITH_BRANCHES, []))
def test_every_layout_with_branches(name: str):
    objective, budget = WITH_BRANCHES[name]
    assert_parity(objective, budget, branches=True, **LAYOUTS[name])


@pytest.mark.exhaustive
def test_as_a_command():
    command = [
        sys.executable,
        "tools/layout_parity.py",
        "--data",
        "2",
        "--objective",
        "grpo",
        "--seed",
        "4",
        "--steps",
        "3",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    names = ("coefficients", "gradient", "log_probs", "parameters")
    assert found.keys() == {f"{name}_max_relative_diff" for name in names}
    assert max(found.values()) < TOLERANCE


def test_a_layout_that_does_not_divide():
    command = [sys.executable, "tools/layout_parity.py", "--expert", "3", "--data", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "layout_parity: parallel.expert = 3 does not divide the number of experts = 8; use one of [1, 2, 4, 8]"
    )
