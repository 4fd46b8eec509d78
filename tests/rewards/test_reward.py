from pathlib import Path

import pytest

from fiberpo_megatron.data.settings import AdditionTask, DataConfig, JsonlTask, SortTask
from fiberpo_megatron.rewards import RandomReward, Score, TaskReward, build_reward, score
from fiberpo_megatron.rewards.verifiers import build_verifier, exact
from fiberpo_megatron.types import Prompt

ADDITION = AdditionTask(kind="addition")
PROMPT = Prompt(index=3458, domain=0, token_ids=(1,), text="34+58=", answer="092")


@pytest.mark.parametrize("response", ["092", " 092\n"])
def test_the_right_answer_earns_one(response):
    assert score(ADDITION, PROMPT, response) == Score(1.0, True)


@pytest.mark.parametrize("response", ["", " ", "92", "0920", "093", "0 92", "092 092", "\x00", "٠٩٢", "9" * 10**6])
def test_everything_else_earns_nothing(response):
    assert score(ADDITION, PROMPT, response) == Score(0.0, False)


def test_each_domain_has_its_verifier():
    reward = TaskReward([ADDITION, SortTask(kind="sort")])
    assert reward.score(PROMPT, "092").correct
    assert reward.score(Prompt(1, 1, (1,), "s:201=", "012"), "012").correct
    reward.close()


def test_an_unknown_verifier_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown verifier 'guess'; use one of exact, math_verify"):
        build_verifier("guess")


def test_exact_ignores_white_space_at_the_ends_of_both():
    assert exact(" a b\n", "a b ") and not exact("a b", "a  b")


def test_the_random_control_is_a_fair_repeatable_coin_that_keeps_the_truth():
    data = DataConfig(tasks=[ADDITION], random_reward=True)
    reward = build_reward(data, seed=5)
    prompts = [Prompt(i, 0, (1,), "", "092") for i in range(100)]
    coins = [reward.score(p, "092", sample).reward for p in prompts for sample in range(16)]
    assert set(coins) == {0.0, 1.0}
    assert 0.45 < sum(coins) / len(coins) < 0.55  # 1600 fair coins: standard deviation 0.0125
    assert coins == [build_reward(data, 5).score(p, "no", s).reward for p in prompts for s in range(16)]
    assert coins != [build_reward(data, 6).score(p, "092", s).reward for p in prompts for s in range(16)]
    assert reward.score(PROMPT, "092").correct and not reward.score(PROMPT, "0").correct
    assert len({tuple(coins[16 * i : 16 * i + 16]) for i in range(100)}) > 95, "coins differ between prompts"


def test_without_the_control_the_reward_is_the_verdict():
    reward = build_reward(DataConfig(tasks=[ADDITION]), seed=0)
    assert not isinstance(reward, RandomReward)
    assert reward.score(PROMPT, "092") == Score(1.0, True)


def test_a_jsonl_task_names_its_verifier():
    task = JsonlTask(kind="jsonl", name="a", train=Path("unused"), reward="exact")
    assert score(task, PROMPT, "092").correct
