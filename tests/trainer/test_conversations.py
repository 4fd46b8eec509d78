"""Trajectories of several turns through the trainer: what the environment wrote has no part in anything."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fiberpo_megatron.data.packing import pack
from fiberpo_megatron.data.settings import JsonlTask
from fiberpo_megatron.rewards import RetryEnvironment, TaskReward
from fiberpo_megatron.rollout.conversation import Dialogue
from fiberpo_megatron.trainer.batch import flatten, mini_batches
from fiberpo_megatron.trainer.generation import Generator
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.types import Coefficients, Completion, Prompt, RolloutGroup, Trajectory, WeightSpan
from tests.trainer.test_loop import FirstToken, training
from tests.trainer.toy import SingleLayout, TablePolicy


def trajectory(mask: list[bool] | None, *, length: int = 7, reward: float = 1.0) -> Trajectory:
    sampled = np.array([True] * length if mask is None else mask)
    log_probs = np.where(sampled, -np.arange(1, len(sampled) + 1), 0).astype(np.float32)
    ids = tuple(range(20, 20 + len(sampled)))
    completion = Completion(ids, log_probs, "stop", (), loss_mask=None if mask is None else sampled)
    return Trajectory(Prompt(0, 0, (3, 4, 5), "p", "1"), completion, "t", reward, True)


def test_masked_tokens_are_in_no_length_weight_or_position():
    holes = [True, True, False, False, False, True, True]
    first, second = trajectory(holes), trajectory(None, length=2, reward=0.0)
    rollouts = flatten([RolloutGroup(first.prompt, (first, second))])
    assert rollouts.response_lengths.tolist() == [4, 2] and rollouts.lengths.tolist() == [10, 5]
    assert rollouts.response_mask.tolist() == [False] * 3 + holes + [False] * 3 + [True] * 2
    (part,) = mini_batches(
        rollouts,
        np.array([1.0, -1.0], np.float32),
        batch=BatchConfig(prompts=1, micro_batch_tokens=32),
        weighting="seq-mean",
        domains=1,
        layout=SingleLayout(),
    )
    tokens = torch.cat([m.response_tokens for m in part.micro_batches])
    assert sorted(tokens.tolist()) == [3, 4, 8, 9, 13, 14]
    assert part.weights.sum().item() == 1
    assert part.weights[part.keys["trajectory"] == 0].tolist() == [0.5 / 4] * 4
    labels = torch.cat([m.labels[m.response_positions] for m in part.micro_batches])
    assert labels.tolist() == rollouts.tokens[tokens].tolist()
    inputs = torch.cat([m.tokens[m.response_positions] for m in part.micro_batches])
    assert inputs.tolist() == rollouts.tokens[tokens - 1].tolist()  # a turn's first token follows the environment's
    assert part.rollout_log_probs.tolist() == rollouts.rollout_log_probs[tokens].tolist()
    assert (part.rollout_log_probs < 0).all()


class TryAgain:
    def reply(self, prompt: Prompt, turns: Sequence[str], sample: int) -> str | None:
        right = turns[-1].split()[0] == prompt.answer
        return None if right or len(turns) == 2 else "again"


def test_a_policy_learns_over_two_turns():
    """The environment's message ends with the prompt, so that a second attempt is asked the same."""
    run, memory = training("fiberpo", trainer={"steps": 12})
    dialogue = Dialogue(TryAgain(), lambda prompt, response, message: (7, 11, *prompt.token_ids))
    run = replace(run, generator=replace(run.generator, dialogue=dialogue))
    train(run)
    turns = memory.values("train", "turns/mean")
    assert turns[0] > 1.8 and turns[-1] < 1.5
    assert memory.values("train", "response_length/max")[0] == 6  # two turns of three tokens
    assert memory.values("train", "accuracy")[-1] > 0.7
    assert max(memory.values("train", "rollout_diff/max")) < 1e-5


def test_the_environments_tokens_get_no_gradient():
    """A row of the toy policy's table is what it says after a token: only rows before sampled tokens move."""
    completion = Completion((1, 2, 7, 8, 9, 3, 4), np.zeros(7, np.float32), "stop", ())
    completion = replace(completion, loss_mask=np.array([True, True, False, False, False, True, True]))
    prompt = Prompt(0, 0, (5, 6), "p", "1")
    rollouts = flatten([RolloutGroup(prompt, (Trajectory(prompt, completion, "t", 1.0, True),))])
    micro_batches = pack(rollouts, [[0]], sequence_multiple=4)
    policy = TablePolicy(1.0)
    policy.step(micro_batches, lambda log_probs, part: Coefficients(torch.ones_like(log_probs)), 1.0)
    moved = policy.table.detach().abs().sum(1).nonzero()[:, 0].tolist()
    assert moved == [1, 3, 6, 9]  # 6 -> 1 -> 2, then 7 8 9 are the environment's, 9 -> 3 -> 4


def test_retry_ends_with_the_right_answer_or_the_last_turn(tmp_path):
    settings = {"kind": "jsonl", "train": tmp_path / "unread.jsonl"}
    tasks = [JsonlTask(name="once", **settings), JsonlTask(name="more", max_turns=3, retry_message="No.", **settings)]
    environment = RetryEnvironment(tasks, TaskReward(tasks))
    once, more = (Prompt(0, domain, (1,), "p", "8") for domain in (0, 1))
    assert environment.reply(once, ["5"], 0) is None
    assert environment.reply(more, ["5"], 0) == "No."
    assert environment.reply(more, ["5", "8"], 0) is None
    assert environment.reply(more, ["5", "6"], 0) == "No."
    assert environment.reply(more, ["5", "6", "7"], 0) is None


def test_every_turn_must_come_from_the_published_weights():
    class Stale:
        def sample(
            self, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int], stop: Callable[[], bool]
        ) -> Iterator[tuple[int, list[Completion]]]:
            version = "1" if len(prompts[0]) == 1 else "0"
            spans = (WeightSpan(version, 0, 1),)
            for index in range(len(prompts)):
                yield index, [Completion((9,), np.array([-1.0], np.float32), "stop", spans)] * count

    dialogue = Dialogue(TryAgain(), lambda prompt, response, message: (7,))
    generator = Generator(Stale(), lambda ids: "5", FirstToken(), 0, dialogue)
    with pytest.raises(RuntimeError, match=r"sampled with weights \['0'\], but '1' was published last"):
        list(generator.groups([Prompt(0, 0, (3,), "p", "8")], 2, "1"))
