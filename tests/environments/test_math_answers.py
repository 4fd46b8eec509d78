"""These tests run the process around math-verify.

The library itself is optional: a stand-in of the same name is laid on the worker's path, so that time limits, crashes
and restarts are tested everywhere.
"""

import asyncio
import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from fiberpo_megatron.environments import Turn
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.builtin import math_answers
from fiberpo_megatron.environments.builtin.math_answers import MathVerifier
from fiberpo_megatron.environments.results import Failure
from tests.environments.pools import pool_of

STAND_IN = """
import os, sys, time
def parse(text, parsing_timeout):
    if text == "hang":
        while True: pass
    if text == "die":
        print("out of memory", file=sys.stderr, flush=True)
        os._exit(3)
    if text == "raise":
        raise RecursionError
    return text.strip("$")
def verify(gold, target, timeout_seconds):
    return float(gold) == float(target)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(math_answers, "find_spec", lambda name: object())
    verifier = MathVerifier(timeout_s=0.5)
    yield verifier
    verifier.close()


def test_equal_text_needs_no_library(stand_in):
    assert stand_in("x", " x\n")
    assert not stand_in("x", "  ")
    assert stand_in._process is None


def test_the_library_decides_the_rest(stand_in):
    assert stand_in("0.5", "0.50") and not stand_in("0.5", "0.6") and not stand_in("0.5", "raise")
    assert stand_in("7", "\ud800 \x00" * 10**6 + "7") is False


def test_a_comparison_that_never_ends_is_wrong_and_the_next_one_works(stand_in):
    began = time.monotonic()
    assert not stand_in("1", "hang")
    assert time.monotonic() - began < 20, "killed by its alarm, not waited for"
    assert stand_in("1", "1.0")


def test_a_process_that_dies_is_reported_with_its_last_words(stand_in):
    with pytest.raises(RuntimeError, match=r"(?s)ended with exit code 3; .*out of memory"):
        stand_in("1", "die")
    assert stand_in("1", "1.0"), "a new process answers"


def test_a_process_killed_between_calls_is_reported(stand_in):
    assert stand_in("1", "1.0")
    os.kill(stand_in._process.pid, signal.SIGKILL)
    stand_in._process.wait()
    with pytest.raises(RuntimeError, match="exit code -9"):
        stand_in("1", "1.00")


def test_closing_leaves_no_process(stand_in):
    assert stand_in("1", "1.0")
    process = stand_in._process
    stand_in.close()
    assert process.returncode is not None
    stand_in.close()


def test_a_missing_library_names_the_command(monkeypatch):
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run `pip install math-verify`"):
        MathVerifier()


def test_the_worker_imports_nothing_of_this_package():
    assert "fiberpo_megatron" not in Path(math_answers.WORKER).read_text()


@pytest.fixture(scope="module")
def library():
    """Start the real library once for all answers."""
    verifier = MathVerifier(timeout_s=5.0)
    yield verifier
    verifier.close()


@pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")
@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        (r"\frac12", "the half: 0.5", True),
        ("72", r"so \boxed{72}.", True),
        ("72", r"\boxed{71} or \boxed{72}", False),
        ("72", "I think 71 or 72", True),  # the last number counts: documented
        ("72", "73", False),
        ("x+1", "$1+x$", True),
        ("1,000", "1000", True),
        ("3", "9**9**9**9", False),
        ("3", "\\boxed{" * 3000, False),
        ("3", "", False),
    ],
)
def test_the_real_library(library, answer, response, correct):
    assert library(answer, response) is correct


def scored(folder: Path, hostile: list[str], honest: int, budget: StepBudget | None = None, **changes):
    """Return the results and the ends (s) of hostile and of honest answers, all asked of two workers of "math" at
    once: two hostile ones first, the others spread among the honest ones."""
    (folder / "a.jsonl").write_text(json.dumps({"prompt": "a", "answer": "0.5"}))
    options = {"name": "t", "train": str(folder / "a.jsonl")}

    async def scenario():
        async with pool_of("math", options=options, **changes) as pool:
            (task,) = await pool.tasks("train", [0])
            began = time.monotonic()

            async def one(text: str):
                result = await pool.score(task, Turn(text), seed=0, budget=budget)
                return result, time.monotonic() - began

            texts = hostile[:2] + [f"0.5{'0' * (1 + i % 5)}" for i in range(honest)]
            for place, text in enumerate(hostile[2:], 1):
                texts.insert(place * (honest // len(hostile)), text)
            found = list(zip(texts, await asyncio.gather(*map(one, texts))))
            return [r for t, r in found if t in hostile], [r for t, r in found if t not in hostile]

    return asyncio.run(scenario())


def test_a_hostile_expression_does_not_hold_up_the_others(tmp_path, monkeypatch):
    """It takes its deadline, on one of two workers; the honest ones are done before."""
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ((bad, bad_end),), good = scored(tmp_path, ["hang"], 100, deadline_s=2.5)
    assert isinstance(bad, Failure) and bad.kind == "deadline"
    assert all(result.correct for result, _ in good)
    assert max(end for _, end in good) < bad_end, "100 comparisons in the other worker take a fraction of 2.5 s"


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")
def test_hostile_expressions_end_inside_the_budget_of_the_step(tmp_path):
    """math-verify gives each 5 s; 20 on two workers would take 56 s. Whatever is cut, no honest one is called wrong."""
    hostile = [f"9**9**9**{number}" for number in range(60, 80)]
    budget = StepBudget(30.0, workers=2, calls=220)
    bad, good = scored(tmp_path, hostile, 200, budget, deadline_s=30.0, memory_gib=6.0)
    assert all(isinstance(result, Failure) or not result.correct for result, _ in bad)
    assert max(end for _, end in bad + good) < 34
    assert all(isinstance(result, Failure) or result.correct for result, _ in good)
    assert any(not isinstance(result, Failure) for result, _ in good)
