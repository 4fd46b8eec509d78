"""What an environment may take for one step is bounded, and quick answers do not pay for slow ones."""

import asyncio
import time
from typing import Any

import pytest

from fiberpo_megatron.environments import Outcome, Task, Turn
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.results import Failure
from tests.environments.pools import failures_in, policy, pool_of, settings, task


def test_the_first_half_is_free_and_the_second_is_divided():
    budget = StepBudget(10.0, workers=2, calls=5)
    budget.spend(4.9)
    assert budget.part_s is None and not budget.exhausted
    budget.spend(0.1)
    assert budget.part_s == 2.0, "5 s of two workers for 5 calls"
    for _ in range(4):
        budget.end_call()
    assert budget.part_s == 10.0, "what the others have not used is for the last"
    budget.spend(4.0)
    assert budget.part_s == pytest.approx(2.0)
    budget.end_call()
    budget.end_call()  # more calls than were announced
    budget.spend(1.0)
    assert budget.exhausted and budget.part_s == 0.0


def test_a_step_has_ten_deadlines_unless_it_is_set():
    assert settings("Scored", deadline_s=3.0).step_seconds == 30.0
    assert settings("Scored", deadline_s=3.0, step_budget_s=5.0).step_seconds == 5.0
    with pytest.raises(ValueError, match=r"'env': step_budget_s = 2 is below deadline_s = 3, the time of one"):
        settings("Scored", deadline_s=3.0, step_budget_s=2.0)


def timed(calls: list[Task], budget: StepBudget, **changes: Any) -> tuple[list[Outcome | Failure], float, Any, Any]:
    """Return the results of all calls at once, the seconds, the counts, and a quick answer of the next step."""

    async def scenario() -> tuple[list[Outcome | Failure], float, Any, Any]:
        async with pool_of("Scored", **changes) as pool:
            began = time.monotonic()
            scores = (pool.score(t, Turn("x"), seed=i, sample=i, budget=budget) for i, t in enumerate(calls))
            results = await asyncio.gather(*scores)
            seconds = time.monotonic() - began
            counts = pool.take_counts()
            return results, seconds, counts, await asyncio.wait_for(pool.score(task("fine"), Turn("x"), seed=0), 10)

    return asyncio.run(scenario())


def test_2000_slow_expressions_end_inside_the_budget(tmp_path):
    """Without it they would take 4000 s: each of them 4 s, on two workers."""
    calls = [task("sleep", number) for number in range(2000)]
    results, seconds, counts, after = timed(
        calls, StepBudget(2.0, workers=2, calls=2000), deadline_s=4.0, folder=tmp_path
    )
    # what follows the end: the last tick, the records of the failures, and whatever else this machine does
    assert 2.0 <= seconds < 8.0
    assert {result.kind for result in results} == {"deadline"}  # type: ignore[union-attr]
    assert counts["cut_by_budget"] == counts["failures/deadline"] == 2000
    records = failures_in(tmp_path)
    assert sorted(record["sample"] for record in records) == list(range(2000)), "who was cut is written down"
    assert all("step_budget_s = 2 s, and this was spent" in record["message"] for record in records)
    assert any("misbehaving.py" in record["traceback"] for record in records), "where those hung that had begun"
    assert after == Outcome(1.0)


def test_quick_answers_do_not_pay_for_slow_ones():
    """Two workers, three that hang, each in front of quick ones: the half that is kept suffices for those."""
    calls = [task("sleep" if number % 68 == 0 else "fine", number) for number in range(204)]
    budget = StepBudget(4.0, workers=2, calls=len(calls))
    results, seconds, counts, _ = timed(calls, budget, deadline_s=4.0)
    slow = [result for call, result in zip(calls, results) if call.answer == "sleep"]
    quick = [result for call, result in zip(calls, results) if call.answer == "fine"]
    assert [result.kind for result in slow] == ["deadline"] * 3  # type: ignore[union-attr]
    assert quick == [Outcome(1.0)] * 201
    assert counts["cut_by_budget"] == 3 and 2.0 <= seconds < 8.0


def test_a_budget_that_suffices_changes_nothing():
    calls = [task("nap" if number == 0 else "fine", number) for number in range(50)]
    results, _, counts, _ = timed(calls, StepBudget(30.0, workers=2, calls=50), deadline_s=1.0)
    assert results == [Outcome(1.0)] * 50 and not counts


def test_what_comes_after_the_end_is_cut_at_once():
    budget = StepBudget(1.0, workers=2, calls=3)
    budget.spend(1.0)
    results, seconds, counts, after = timed([task("fine", number) for number in range(3)], budget)
    assert [result.kind for result in results] == ["deadline"] * 3  # type: ignore[union-attr]
    assert seconds < 2 and counts["cut_by_budget"] == 3 and counts["worker_deaths"] == 0 and after == Outcome(1.0)


def test_conversations_are_cut_but_not_while_the_policy_speaks():
    async def scenario() -> tuple[list[Any], float, Any]:
        async with pool_of("Talking", deadline_s=6.0) as pool:
            budget = StepBudget(1.0, workers=2, calls=3)
            began = time.monotonic()
            calls = [
                pool.run(task("wait"), policy(), seed=0, sample=0, budget=budget),
                pool.run(task("fine"), policy(delay_s=0.5), seed=1, sample=1, budget=budget),
            ]
            results = await asyncio.gather(*calls)
            seconds = time.monotonic() - began
            patient = StepBudget(0.5, workers=2, calls=1)
            results.append(await pool.run(task("fine"), policy(delay_s=0.8), seed=1, sample=2, budget=patient))
            return results, seconds, pool.take_counts()

    (waits, talks, patient), seconds, counts = asyncio.run(scenario())
    assert waits.kind == "deadline" and isinstance(talks, Outcome) and isinstance(patient, Outcome)
    assert 0.9 < seconds < 5.5 and counts["failures"] == counts["cut_by_budget"] == 1


def test_a_slow_call_holds_up_nobody_behind_it():
    """Quick calls are sent ahead; those behind a slow one go to the other worker."""

    async def scenario() -> tuple[dict[str, float], list[Any], Any]:
        async with pool_of("Scored", deadline_s=4.0) as pool:
            ended: dict[str, float] = {}

            async def timed(deed: str, number: int) -> Any:
                result = await pool.score(task(deed, number), Turn("x"), seed=number)
                ended[deed] = time.monotonic()
                return result

            await asyncio.gather(*(timed("fine", number) for number in range(400)))  # the pool sees that they are quick
            deeds = ["fine"] * 20 + ["late"] + ["fine"] * 40
            results = await asyncio.gather(*(timed(deed, number) for number, deed in enumerate(deeds)))
            return ended, results, pool.take_counts()

    ended, results, counts = asyncio.run(scenario())
    assert results == [Outcome(1.0)] * 61 and not counts
    assert ended["fine"] < ended["late"] - 0.5, "the slow one takes 1.3 s"


def test_a_call_that_was_taken_back_may_return_to_its_worker():
    """One worker alone: what it says about the call that it was to forget is not about the call that it gets again."""

    async def scenario() -> tuple[list[Any], Any]:
        async with pool_of("Scored", workers=1, deadline_s=4.0) as pool:
            await asyncio.gather(*(pool.score(task("fine", n), Turn("x"), seed=n) for n in range(200)))
            deeds = ["fine"] * 3 + ["nap"] + ["fine"] * 20
            calls = (pool.score(task(deed, n), Turn("x"), seed=n) for n, deed in enumerate(deeds))
            return await asyncio.gather(*calls), pool.take_counts()

    results, counts = asyncio.run(scenario())
    assert results == [Outcome(1.0)] * 24 and not counts
