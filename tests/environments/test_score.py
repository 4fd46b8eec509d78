"""Workers give tasks and scores: what they give arrives, what cannot be had is named, and chance can be repeated."""

import asyncio

import pytest

from fiberpo_megatron.environments import Outcome, Trajectory, Turn
from fiberpo_megatron.environments.host import EnvironmentFailed
from tests.environments.pools import failures_in, pool_of, task


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
