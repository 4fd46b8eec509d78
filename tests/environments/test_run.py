"""Conversations share a worker: time is charged to its user, what is said arrives, and chance can be repeated."""

import asyncio
import time

import pytest

from fiberpo_megatron.environments import Outcome, Turn
from tests.environments.pools import policy, pool_of, run_all, task


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
