"""These tests call what misbehaves: each call is bounded in time, counted and written down."""

import asyncio
import json
import time
from types import SimpleNamespace

import psutil
import pytest

from fiberpo_megatron.environments import Outcome, Trajectory, Turn
from fiberpo_megatron.environments.host import EnvironmentFailed, Failure
from tests.environments.pools import failures_in, pool_of, task

EXPECTED = {
    "loop": ("deadline", "held its worker longer than deadline_s = 1 s"),
    "sleep": ("deadline", "held its worker longer"),
    "pow": ("deadline", "held its worker longer"),
    "print": ("deadline", "held its worker longer"),
    "late": ("deadline", "longer than deadline_s = 1 s"),
    "eat": ("memory", "MemoryError"),
    "exit": ("died", r"(?s)ended with exit code 3; its last output:.*these are my last words"),
    "segfault": ("died", "was ended by SIGABRT"),
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
def everything(tmp_path_factory):
    """Do all deeds at once, each among innocent calls, through one pool of two workers."""
    folder = tmp_path_factory.mktemp("run") / "environments"

    async def scenario():
        async with pool_of("Scored", folder) as pool:
            began = time.monotonic()
            calls = [(deed, pool.score(task(deed), Turn("x"), seed=7)) for deed in EXPECTED]
            calls += [("fine", pool.score(task("fine", n), Turn("x"), seed=n)) for n in range(FINE)]
            calls = calls[::2] + calls[1::2]  # innocent calls wait behind every culprit
            results = await asyncio.gather(*(call for _, call in calls))
            seconds = time.monotonic() - began
            return [(deed, result) for (deed, _), result in zip(calls, results)], pool.take_counts(), seconds

    results, counts, seconds = asyncio.run(scenario())
    return SimpleNamespace(results=results, counts=counts, seconds=seconds, folder=folder)


@pytest.mark.parametrize("deed", EXPECTED)
def test_a_culprit_fails_with_its_cause(everything, deed):
    (failure,) = [result for name, result in everything.results if name == deed]
    kind, message = EXPECTED[deed]
    assert isinstance(failure, Failure) and failure.kind == kind
    assert pytest.importorskip("re").search(message, failure.message), failure.message
    assert failure.message.startswith(f"environment 'env': score() of task {deed}/0 failed ({kind}): ")


def test_the_others_get_their_outcomes(everything):
    outcomes = [result for name, result in everything.results if name == "fine"]
    assert outcomes == [Outcome(1.0)] * FINE


def test_it_ends_in_time(everything):
    assert everything.seconds < 60, "six deadlines of 1 s and eight new workers, in two workers"


def test_every_failure_is_counted(everything):
    counts = everything.counts
    kinds = [kind for kind, _ in EXPECTED.values()]
    assert counts["failures"] == len(EXPECTED)
    assert all(counts[f"failures/{kind}"] == kinds.count(kind) for kind in kinds)
    assert counts["worker_deaths"] >= 6  # loop, sleep, pow, print, exit, segfault


def test_every_failure_is_written_with_its_task(everything):
    records = {record["task"]["answer"]: record for record in failures_in(everything.folder)}
    assert len(failures_in(everything.folder)) == len(EXPECTED) and set(records) == set(EXPECTED)
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


def test_the_logs_are_bounded(everything):
    logs = sorted(everything.folder.glob("env_rank00000_worker?.log"))
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


@pytest.mark.parametrize(
    ("index", "cause"),
    [
        (1, r"train\(1\) failed \(exception\): ValueError: the file is damaged"),
        (2, r"train\(2\) failed \(deadline\): it held its worker longer than deadline_s = 1 s"),
        (3, r"train\(3\) failed \(invalid\): `prompt` of train\(3\) holds white space only"),
        (4, r"`metadata` of train\(4\)\['at'\] is a set, which JSON cannot represent"),
        (5, r"train\(5\) returned a \(str\); return a Task"),
    ],
)
def test_a_task_that_cannot_be_had_is_named(task_pool, index, cause):
    loop, pool, folder = task_pool
    with pytest.raises(EnvironmentFailed, match=f"environment 'env': .*{cause}"):
        loop.run_until_complete(pool.tasks("train", [0, index, 7]))
    assert any(f"train({index})" in record["message"] for record in failures_in(folder))


@pytest.fixture(scope="module")
def task_pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    with asyncio.Runner() as runner:
        context = pool_of("Scored", folder, workers=1)
        pool = runner.run(context.__aenter__())
        yield runner.get_loop(), pool, folder
        runner.run(context.__aexit__(None, None, None))


def test_tasks_arrive_with_names(task_pool):
    loop, pool, _ = task_pool
    first, six = loop.run_until_complete(pool.tasks("train", [0, 6]))
    assert first.id == "env/train/0" and first.prompt == "a" and first.answer == "0"
    assert six.id == "six" and six.answer == [1, 2] and six.prompt == [{"role": "user", "content": "b"}]
    (held_out,) = loop.run_until_complete(pool.tasks("held_out", [1]))
    assert held_out.id == "env/held_out/1"
    with pytest.raises(IndexError, match="env has no train task 8; there are 8"):
        loop.run_until_complete(pool.tasks("train", [8]))


def test_groups_are_scored_together():
    turns = [Turn("a"), Turn("bbb"), Turn("cc")]
    trajectories = [Trajectory((turn,), Outcome(0.0)) for turn in turns]

    async def scenario():
        async with pool_of("Grouped", workers=1) as pool:
            description = pool._described()
            assert description.scores_groups and not description.scores and description.single_turn
            few = await pool.score_group(task("few"), trajectories, seed=1)
            return few, await pool.score_group(task("fine"), trajectories, seed=1)

    few, outcomes = asyncio.run(scenario())
    assert few.kind == "invalid" and "one Outcome for each of the 3 trajectories" in few.message
    assert [outcome.reward for outcome in outcomes] == [0.0, 1.0, 0.0]


def test_chance_depends_on_the_seed_alone():
    async def scenario(workers, seeds):
        async with pool_of("ScoredChance", workers=workers) as pool:
            calls = (pool.score(task("fine"), Turn("x"), seed=seed) for seed in seeds)
            return dict(zip(seeds, [outcome.reward for outcome in await asyncio.gather(*calls)]))

    seeds = [*range(20), 2**62, 2**80]
    one, two = asyncio.run(scenario(1, seeds)), asyncio.run(scenario(2, seeds[::-1]))
    assert one == two and len(set(one.values())) == len(seeds)


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


def test_the_failures_file_is_json_of_one_line_each(everything):
    text = (everything.folder / "env_rank00000.failures.jsonl").read_text()
    assert all(json.loads(line) for line in text.splitlines())
