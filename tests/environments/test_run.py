"""Conversations share a worker: only a culprit fails, time is charged to its user, and chance can be repeated."""

import asyncio
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest

from fiberpo_megatron.environments import Outcome, Turn
from fiberpo_megatron.environments.host import EnvironmentFailed, Failure
from tests.environments.pools import failures_in, policy, pool_of, task

EXPECTED = {
    "loop": ("deadline", "held its worker longer than deadline_s = 1.5 s"),
    "sleep": ("deadline", "held its worker longer"),
    "child_loop": ("deadline", "held its worker longer"),
    "wait": ("deadline", "it worked longer than deadline_s = 1.5 s"),
    "stubborn": ("deadline", "it worked longer"),
    "late_return": ("deadline", "it worked longer"),
    "eat": ("memory", "MemoryError"),
    "exit": ("died", r"(?s)ended with exit code 3; its last output:.*my last words"),
    "raise": ("exception", "KeyError"),
    "system_exit": ("exception", "SystemExit: I have had enough"),
    "cancels": ("exception", "CancelledError"),
    "number": ("invalid", r"run\(\) returned 1.0 \(float\); return an Outcome"),
    "chatter": ("output", r"its output is \d+ KiB, above output_kib = 64"),
    "cheat": ("output", r"its output is \d+ KiB, above output_kib = 64"),
}
SIBLINGS = 8


def run_all(deeds, folder=None, converse=None, use="Talking", **changes):
    """Return the results of one conversation per deed, all at once, and what was counted."""

    async def scenario():
        async with pool_of(use, folder, **changes) as pool:
            runs = (
                pool.run(task(deed, number), converse or policy(), seed=number) for number, deed in enumerate(deeds)
            )
            return await asyncio.gather(*runs), pool.take_counts()

    return asyncio.run(scenario())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Do all deeds at once, with patient conversations beside them in the same two workers."""
    folder = tmp_path_factory.mktemp("run")
    deeds = [*EXPECTED, *["patient"] * SIBLINGS]
    results, counts = run_all(deeds, folder, workers=2, deadline_s=1.5)
    return SimpleNamespace(results=list(zip(deeds, results)), counts=counts, folder=folder)


@pytest.mark.parametrize("deed", EXPECTED)
def test_a_culprit_fails_with_its_cause(everything, deed):
    (failure,) = [result for name, result in everything.results if name == deed]
    kind, message = EXPECTED[deed]
    assert isinstance(failure, Failure) and failure.kind == kind
    assert re.search(message, failure.message), failure.message


def test_siblings_get_their_outcomes(everything):
    assert [result for name, result in everything.results if name == "patient"] == [Outcome(5.0)] * SIBLINGS


def test_failures_are_counted_and_written_once(everything):
    assert everything.counts["failures"] == len(EXPECTED)
    assert everything.counts["restarted"] >= 1
    records = failures_in(everything.folder)
    assert sorted(record["task"]["answer"] for record in records) == sorted(EXPECTED)
    (wait,) = [record for record in records if record["task"]["answer"] == "wait"]
    assert "misbehaving.py" in wait["traceback"] and "wait()" in wait["traceback"], "where it waited"
    (child,) = [record for record in records if record["task"]["answer"] == "child_loop"]
    assert " in block" in child["traceback"], "a task of the conversation held the loop"


@pytest.mark.parametrize(("deed", "kind"), [("callback_loop", "deadline"), ("thread_exit", "died")])
def test_a_culprit_that_nobody_saw_ends_alone(deed, kind):
    """A callback and a thread are no steps of a conversation, so that only restarts in smaller groups find them."""
    results, counts = run_all([deed, *["patient"] * 5], workers=1, deadline_s=1.5)
    assert isinstance(results[0], Failure) and results[0].kind == kind
    assert results[1:] == [Outcome(5.0)] * 5
    assert counts["failures"] == 1 and counts["restarted"] >= 5


def test_a_thread_that_does_not_end_costs_its_worker_once_the_others_are_done():
    async def scenario():
        async with pool_of("Talking", workers=1, deadline_s=1.5) as pool:
            runs = (pool.run(task(deed), policy(), seed=0) for deed in ("thread_loop", "patient"))
            first = await asyncio.gather(*runs)
            return first, await pool.run(task("fine"), policy(), seed=0), pool.take_counts()

    (stuck, beside), after, counts = asyncio.run(scenario())
    assert stuck.kind == "deadline" and "to_thread" in stuck.traceback
    assert beside == after == Outcome(5.0)
    assert counts["worker_deaths"] == 1 and not counts["restarted"]


def test_the_policys_time_does_not_count():
    (outcome,), _ = run_all(["says 2"], converse=policy(delay_s=0.8), workers=1, deadline_s=1.0)
    assert outcome == Outcome(5.0), "2.4 s of sampling"


def test_time_in_which_others_hold_the_loop_does_not_count():
    deeds = ["patient", *["nap"] * 4]
    began = time.monotonic()
    results, counts = run_all(deeds, workers=1, deadline_s=2.9)
    assert results == [Outcome(5.0)] * 5 and not counts
    assert time.monotonic() - began > 3.0, "the naps of 0.8 s block one another and the patient one"


@pytest.mark.parametrize(
    ("deed", "outcome"),
    [
        ("twice", Outcome(0.5, metrics={"earlier": 1.0})),
        ("gives_up", Outcome(0.25, metrics={"cancelled": 1.0})),
        ("impossible", Outcome(0.125, metrics={"named": 1.0})),
    ],
)
def test_say_refuses_what_cannot_be_said(deed, outcome):
    def answer(call, new):
        if new == "impossible":
            raise ValueError("a message that cannot follow")
        return "hello"

    delay_s = 0.5 if deed == "gives_up" else 0.0
    results, _ = run_all([deed], converse=policy(answer, delay_s), workers=1, deadline_s=5.0)
    assert results == [outcome]


def test_what_is_said_arrives_as_it_was():
    seen = []

    def converse():
        async def say(new, tools, max_tokens, stop):
            seen.append((new, tools, max_tokens, stop))
            return Turn("é\ud800", "length", (1, 2))

        return say

    (outcome,), _ = run_all(["says 1"], converse=converse, workers=1)
    assert outcome == Outcome(2.0)
    assert seen == [
        ("please says 1", None, None, None),
        ([{"role": "user", "content": "0"}], None, 5, ["x"]),
    ]


def test_a_failing_engine_is_no_failure_of_the_environment():
    class EngineDown(RuntimeError):
        pass

    def broken():
        async def say(new, tools, max_tokens, stop):
            raise EngineDown("no route to engine 3")

        return say

    async def scenario():
        async with pool_of("Talking", workers=1) as pool:
            beside = asyncio.create_task(pool.run(task("patient"), policy(), seed=0))
            with pytest.raises(EngineDown, match="engine 3"):
                await pool.run(task("fine"), broken, seed=0)
            return await beside, await pool.run(task("fine"), policy(), seed=0), pool.take_counts()

    beside, after, counts = asyncio.run(scenario())
    assert beside == after == Outcome(5.0) and not counts


def test_a_caller_that_gives_up_frees_the_worker():
    async def scenario():
        async with pool_of("Talking", workers=1, concurrent=1, deadline_s=60.0) as pool:
            waiting = asyncio.create_task(pool.run(task("wait"), policy(), seed=0))
            await asyncio.sleep(0.3)
            waiting.cancel()
            return await asyncio.wait_for(pool.run(task("fine"), policy(), seed=0), 20), pool.take_counts()

    outcome, counts = asyncio.run(scenario())
    assert outcome == Outcome(5.0) and not counts


def test_chance_depends_on_the_seed_alone():
    alone, _ = run_all(["x"] * 6, use="Chance", workers=1, concurrent=1)
    for delays in (0.02, 0.005):

        def converse(delays=delays):
            async def say(new, tools, max_tokens, stop):
                await asyncio.sleep(delays)
                return Turn("go")

            return say

        together, _ = run_all(["x"] * 6, use="Chance", workers=1, converse=converse)
        assert together == alone
    assert len({outcome.reward for outcome in alone}) == 6


@pytest.mark.parametrize("use", ["Crashing", "Replayed"])
def test_after_a_crash_a_conversation_starts_again_or_is_replayed(tmp_path, use):
    made = []

    def converse():
        made.append([])
        number, calls = len(made), made[-1]

        async def say(new, tools, max_tokens, stop):
            calls.append(new)
            return Turn(f"policy {number} answer {len(calls)}")

        return say

    async def scenario():
        async with pool_of(use, workers=1, options={"flag": str(tmp_path / "flag")}, deadline_s=20.0) as pool:
            crash = pool.run(task("crash"), converse, seed=1)
            beside = pool.run(task("patient"), policy(delay_s=1.0), seed=2)
            return (*await asyncio.gather(crash, beside), pool.take_counts())

    outcome, beside, counts = asyncio.run(scenario())
    expected = 1 if use == "Replayed" else 2
    assert len(made) == expected
    assert list(outcome.metrics) == [f"policy {expected} answer {n}" for n in (1, 2, 3, 4)]
    assert len(made[-1]) == 4, "no answer was asked for twice"
    assert isinstance(beside, Outcome) and counts["restarted"] == 2 and "failures" not in counts


def test_a_worker_that_someone_else_kills_costs_nothing_but_time():
    async def scenario():
        async with pool_of("Talking", workers=1, deadline_s=20.0) as pool:
            run = asyncio.create_task(pool.run(task("fine"), policy(delay_s=1.0), seed=0))
            await asyncio.sleep(0.5)
            os.kill(pool._slots[0].process.pid, signal.SIGKILL)
            return await run, pool.take_counts()

    outcome, counts = asyncio.run(scenario())
    assert outcome == Outcome(5.0) and counts == {"worker_deaths": 1, "restarted": 1}


def test_a_replay_that_asks_something_else_is_invalid(tmp_path):
    results, counts = run_all(
        ["fickle", "crash"],
        use="Replayed",
        workers=1,
        deadline_s=20.0,
        options={"flag": str(tmp_path / "flag")},
        converse=policy(delay_s=0.2),
    )
    assert results[0].kind == "invalid" and "set deterministic = False" in results[0].message
    assert isinstance(results[1], Outcome) and counts["failures"] == 1


def test_a_worker_that_does_not_start_again_ends_the_pool(tmp_path):
    code = """
import os
from pathlib import Path
from fiberpo_megatron.environments import SingleTurn, Task
class Once(SingleTurn):
    train_size = 1
    def __init__(self, flag):
        Path(flag).mkdir()
    def train(self, index):
        return Task("a")
    def score(self, task, turn):
        os._exit(1)
"""
    (tmp_path / "only_once.py").write_text(code)

    async def scenario(monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = {"flag": str(tmp_path / "flag")}
        async with pool_of("only_once:Once", workers=1, options=options) as pool:
            first = await pool.score(task("x"), Turn("x"), seed=0)
            with pytest.raises(EnvironmentFailed, match="does not start again: .*FileExistsError"):
                await asyncio.wait_for(pool.score(task("x"), Turn("x"), seed=0), 60)
            return first

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert asyncio.run(scenario(monkeypatch)).kind == "died"
