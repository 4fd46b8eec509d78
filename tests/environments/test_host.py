"""Workers do what they must not: they loop for ever, take 10 GB, crash, answer late. Each call is bounded, counted and
written down, the others get their outcomes, and the run goes on."""

import asyncio
import json
import os
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from fiberpo_megatron.environments import Outcome, Turn, slots
from fiberpo_megatron.environments.host import EnvironmentFailed, EnvironmentPool, Failure
from fiberpo_megatron.environments.process import WorkerProcess
from fiberpo_megatron.rollout.environments import RunningEnvironment
from fiberpo_megatron.trainer.loop import train
from tests.environments.pools import failures_in, policy, pool_of, run_all, settings, task
from tests.trainer.test_loop import training
from tests.trainer.toy import LOOP, read

SCORED = {
    "loop": ("deadline", "held its worker longer than deadline_s = 1 s"),
    "sleep": ("deadline", "held its worker longer"),
    "pow": ("deadline", "held its worker longer"),
    "print": ("deadline", "held its worker longer"),
    "late": ("deadline", "longer than deadline_s = 1 s"),
    "eat": ("memory", "MemoryError"),
    "exit": ("died", r"(?s)ended with exit code 3; its last output:.*these are my last words"),
    "segfault": ("died", "ended with signal SIGABRT"),
    "raise": ("exception", "KeyError: 'no such thing'"),
    "raise_escapes": ("exception", r"no number: \\x1b\[2J\\u202e\\ud800"),
    "raise_badly": ("exception", "Unshowable, whose text raises RuntimeError"),
    "system_exit": ("exception", "SystemExit: I have had enough"),
    "text": ("invalid", r"is one \(str\); it must be a number or an Outcome"),
    "none": ("invalid", r"is None \(NoneType\); it must be a number or an Outcome"),
    "nan": ("invalid", r"`rewards` of score\(\)\['style'\] is nan; it must be finite"),
    "inf": ("invalid", "is inf; it must be finite"),
    "bad_name": ("invalid", "has the name 3; names must be strings"),
    "bad_correct": ("invalid", "`correct` of .* is yes; it must be True, False or None"),
    "flood": ("output", r"its output is \d+ KiB, above output_kib = 64"),
}
FINE = 60


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Do all deeds at once, each among innocent calls, through one pool of two workers."""
    folder = tmp_path_factory.mktemp("run") / "environments"

    async def scenario():
        async with pool_of("Scored", folder) as pool:
            began = time.monotonic()
            calls = [(deed, pool.score(task(deed), Turn("x"), seed=7)) for deed in SCORED]
            calls += [("fine", pool.score(task("fine", n), Turn("x"), seed=n)) for n in range(FINE)]
            calls = calls[::2] + calls[1::2]  # innocent calls wait behind every culprit
            results = await asyncio.gather(*(call for _, call in calls))
            seconds = time.monotonic() - began
            return [(deed, result) for (deed, _), result in zip(calls, results)], pool.take_counts(), seconds

    results, counts, seconds = asyncio.run(scenario())
    return SimpleNamespace(results=results, counts=counts, seconds=seconds, folder=folder)


@pytest.mark.parametrize("deed", SCORED)
def test_a_culprit_among_scores_fails_with_its_cause(scored, deed):
    (failure,) = [result for name, result in scored.results if name == deed]
    kind, message = SCORED[deed]
    assert isinstance(failure, Failure) and failure.kind == kind
    assert re.search(message, failure.message), failure.message
    assert failure.message.startswith(f"environment 'env': score() of task {deed}/0 failed ({kind}): ")


def test_the_other_scores_arrive(scored):
    outcomes = [result for name, result in scored.results if name == "fine"]
    assert outcomes == [Outcome(1.0)] * FINE


def test_the_scores_end_in_time(scored):
    assert scored.seconds < 60, "six deadlines of 1 s and eight new workers, in two workers"


def test_every_failure_of_a_score_is_counted(scored):
    counts = scored.counts
    kinds = [kind for kind, _ in SCORED.values()]
    assert counts["failures"] == len(SCORED)
    assert all(counts[f"failures/{kind}"] == kinds.count(kind) for kind in kinds)
    assert counts["worker_deaths"] >= 6  # loop, sleep, pow, print, exit, segfault


def test_every_failure_of_a_score_is_written_with_its_task(scored):
    records = {record["task"]["answer"]: record for record in failures_in(scored.folder)}
    assert len(failures_in(scored.folder)) == len(SCORED) and set(records) == set(SCORED)
    loop = records["loop"]
    assert loop["task"] == {
        "prompt": "please loop",
        "answer": "loop",
        "metadata": {"number": 0},
        "id": "loop/0",
    }
    assert loop["seed"] == 7 and loop["kind"] == "deadline" and "deadline_s" in loop["message"]
    assert "misbehaving.py" in loop["traceback"] and " in do" in loop["traceback"], "where it hung"
    assert "KeyError" in records["raise"]["traceback"]


def test_a_worker_without_a_processor_gets_the_time_to_write_where_it_hung(monkeypatch):
    """A busy machine stands for as long as it likes between the question and the answer; here it is 0.8 s."""
    ask_where = WorkerProcess.ask_where

    def ask_a_stopped_process(process):
        os.kill(process.pid, signal.SIGSTOP)
        ask_where(process)
        asyncio.get_running_loop().call_later(0.8, os.kill, process.pid, signal.SIGCONT)

    async def scenario():
        async with pool_of("Scored", workers=1) as pool:
            return await pool.score(task("loop"), Turn("x"), seed=0)

    monkeypatch.setattr(WorkerProcess, "ask_where", ask_a_stopped_process)
    failure = asyncio.run(scenario())
    assert failure.kind == "deadline" and "misbehaving.py" in failure.traceback and " in do" in failure.traceback


def test_a_worker_that_does_not_say_where_it_hung_is_ended_all_the_same(monkeypatch):
    async def scenario():
        async with pool_of("Scored", workers=1) as pool:
            failure = await pool.score(task("loop"), Turn("x"), seed=0)
            return failure, await pool.score(task("fine"), Turn("x"), seed=0)

    monkeypatch.setattr(WorkerProcess, "ask_where", lambda process: None)
    monkeypatch.setattr(slots, "TRACEBACK_S", 0.3)
    failure, after = asyncio.run(scenario())
    assert failure.kind == "deadline" and failure.traceback == "" and after == Outcome(1.0)


def test_the_logs_are_bounded(scored):
    logs = sorted(scored.folder.glob("env_rank00000_worker?.log"))
    assert [log.name for log in logs] == ["env_rank00000_worker0.log", "env_rank00000_worker1.log"]
    assert all(0 < log.stat().st_size < 1.1 * 2**20 for log in logs)
    assert any(log.stat().st_size > 2**20 and b"is not kept" in log.read_bytes()[-100:] for log in logs), "the flood"


def test_an_async_score_may_wait_but_not_for_ever():
    async def scenario():
        async with pool_of("AsyncScored", workers=1) as pool:
            deeds = ["fine", "wait", "fine", "raise", "exit", "fine"]
            return await asyncio.gather(*(pool.score(task(deed), Turn("x"), seed=0) for deed in deeds))

    fine, wait, *rest = asyncio.run(scenario())
    assert fine == Outcome(1.0) and [getattr(one, "kind", "fine") for one in rest] == [
        "fine",
        "exception",
        "died",
        "fine",
    ]
    assert wait.kind == "deadline" and "misbehaving.py" in wait.traceback and "wait()" in wait.traceback


def test_memory_of_children_counts():
    async def scenario():
        async with pool_of("Scored", workers=1, deadline_s=60.0) as pool:
            failure = await pool.score(task("children_eat"), Turn("x"), seed=0)
            return failure, await pool.score(task("fine"), Turn("x"), seed=0)

    before = set(psutil.Process().children(recursive=True))
    failure, after = asyncio.run(scenario())
    assert failure.kind == "memory" and "more than memory_gib = 0.5" in failure.message
    assert after == Outcome(1.0)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_the_failures_file_is_json_of_one_line_each(scored):
    text = (scored.folder / "env_rank00000.failures.jsonl").read_text()
    assert all(json.loads(line) for line in text.splitlines())


def test_a_caller_that_gives_up_leaves_no_work_behind():
    async def scenario():
        async with pool_of("Scored", workers=1, deadline_s=30.0) as pool:
            slow = asyncio.create_task(pool.score(task("late"), Turn("x"), seed=0))
            queued = asyncio.create_task(pool.score(task("sleep"), Turn("x"), seed=0))
            await asyncio.sleep(0.3)
            slow.cancel()
            queued.cancel()
            began = time.monotonic()
            outcome = await pool.score(task("fine"), Turn("x"), seed=0)
            return outcome, time.monotonic() - began, pool.take_counts()

    outcome, seconds, counts = asyncio.run(scenario())
    assert outcome == Outcome(1.0) and seconds < 10, "the call that was under way took 1.3 s, the queued one none"
    assert not counts


# Conversations, which share a worker

TALKED = {
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


@pytest.fixture(scope="module")
def talked(tmp_path_factory):
    """Do all deeds at once, with patient conversations beside them in the same two workers."""
    folder = tmp_path_factory.mktemp("run")
    deeds = [*TALKED, *["patient"] * SIBLINGS]
    results, counts = run_all(deeds, folder, workers=2, deadline_s=1.5)
    return SimpleNamespace(results=list(zip(deeds, results)), counts=counts, folder=folder)


@pytest.mark.parametrize("deed", TALKED)
def test_a_culprit_among_conversations_fails_with_its_cause(talked, deed):
    (failure,) = [result for name, result in talked.results if name == deed]
    kind, message = TALKED[deed]
    assert isinstance(failure, Failure) and failure.kind == kind
    assert re.search(message, failure.message), failure.message


def test_the_other_conversations_get_their_outcomes(talked):
    assert [result for name, result in talked.results if name == "patient"] == [Outcome(5.0)] * SIBLINGS


def test_failures_of_conversations_are_counted_and_written_once(talked):
    assert talked.counts["failures"] == len(TALKED)
    assert talked.counts["restarted"] >= 1
    records = failures_in(talked.folder)
    assert sorted(record["task"]["answer"] for record in records) == sorted(TALKED)
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


# Workers that end


def test_a_worker_that_someone_else_kills_costs_nothing_but_time():
    async def scenario():
        async with pool_of("Talking", workers=1, deadline_s=20.0) as pool:
            run = asyncio.create_task(pool.run(task("fine"), policy(delay_s=1.0), seed=0))
            await asyncio.sleep(0.5)
            os.kill(pool._slots[0].process.pid, signal.SIGKILL)
            return await run, pool.take_counts()

    outcome, counts = asyncio.run(scenario())
    assert outcome == Outcome(5.0) and counts == {"worker_deaths": 1, "restarted": 1}


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


# A training


def test_a_training_goes_on_with_the_trajectories_that_failed():
    """In each step four of twelve prompts have answers that cannot be scored; all twelve are trained on."""
    deeds = {0: "loop", 3: "eat", 6: "exit", 9: "late"}
    config = settings("Scored", workers=2, on_failure="zero")
    pool = EnvironmentPool(config, folder=None)
    environment = RunningEnvironment(config, LOOP.run(pool.start()), pool)
    found = []

    def misbehaving(places):
        return [
            replace(prompt, task=task(deeds.get(place.index % 12, "fine"), place.index))
            for place, prompt in zip(places, read(places), strict=True)
        ]

    def record(step, groups, **more):
        found.extend((step, trajectory) for group in groups for trajectory in group.trajectories)

    try:
        run, memory = training(
            trainer={"steps": 2},
            batch={"prompts": 12, "samples_per_prompt": 2, "micro_batch_tokens": 64},
            evaluation={"prompts": 0},
        )
        source = run.source
        source.read, source.recorder = misbehaving, SimpleNamespace(rollouts=record)
        source.generator = replace(source.generator, environments=[environment, environment])
        began = time.monotonic()
        train(run)
        seconds = time.monotonic() - began
    finally:
        LOOP.run(pool.close())
    assert [step for step, _ in found] == [0] * 24 + [1] * 24 and len(memory.values("train", "gradient_norm")) == 2
    kinds = {"fine": None} | {deed: SCORED[deed][0] for deed in deeds.values()}
    for _, trajectory in found:
        kind = kinds[trajectory.prompt.task.answer]
        assert trajectory.failure is None if kind is None else trajectory.failure.startswith(f"{kind}: ")
        assert trajectory.reward == (1.0 if kind is None else 0.0)
    assert seconds < 60, "eight deadlines of 1 s and eight new workers, in two workers"
