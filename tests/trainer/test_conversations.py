"""Trajectories of several turns through the trainer: what the environment wrote has no part in anything."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.data.packing import pack
from fiberpo_megatron.environments import Conversation, Environment, Message, Outcome, Task
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.trainer.batch import mini_batches
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.trainer.optimise import ObjectiveGate
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.types import Coefficients, Completion, Prompt, RolloutGroup, Trajectory, WeightSpan, flatten
from tests.trainer.test_loop import training
from tests.trainer.toy import FakeEngine, SingleLayout, TablePolicy, Words, generator


def trajectory(mask: list[bool] | None, *, length: int = 7, reward: float = 1.0) -> Trajectory:
    sampled = np.array([True] * length if mask is None else mask)
    log_probs = np.where(sampled, -np.arange(1, len(sampled) + 1), 0).astype(np.float32)
    ids = tuple(range(20, 20 + len(sampled)))
    completion = Completion(ids, log_probs, "stop", (), loss_mask=None if mask is None else sampled)
    return Trajectory(Prompt(0, 0, (3, 4, 5), "p", Task("p", "1")), completion, "t", reward, True)


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
        version=0,
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


def test_budgets_by_the_place_of_a_turn_reach_the_objective():
    """Ids of turns are those of the mini-batch: 0 and 1 in the first trajectory, 2 in the second."""
    holes = [True, True, False, False, False, True, True]
    rollouts = flatten([RolloutGroup(trajectory(holes).prompt, (trajectory(holes), trajectory(None, length=2)))])
    (part,) = mini_batches(
        rollouts,
        np.array([1.0, -1.0], np.float32),
        batch=BatchConfig(prompts=1, micro_batch_tokens=32),
        weighting="seq-mean",
        domains=1,
        layout=SingleLayout(),
        version=0,
    )
    x = torch.linspace(-0.3, 0.4, len(part.weights))

    def coefficients(first: tuple[float, float]) -> torch.Tensor:
        budgets = {"turn": {"*": (0.4, 0.3), 0: first}}
        gate = ObjectiveGate(build_objective("fiberpo", levels=[["turn"]], budgets=budgets), part, x * 0, None)
        return gate(x, slice(0, len(x))).gradient

    changed = coefficients((0.05, 0.04)) != coefficients((0.4, 0.3))
    assert set(part.keys["turn"][changed].tolist()) == {0, 2}


class TryAgain(Environment):
    """Asks once more after a wrong first token."""

    train_size = held_out_size = 10**6

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        turn = await policy.say(task.prompt)
        right = turn.text.split()[0] == task.answer
        if not right:
            turn = await policy.say("again")
            right = turn.text.split()[0] == task.answer
        return Outcome(float(right), correct=right)


class AskedTheSame(Words):
    """The environment's message ends with the prompt."""

    def following(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        new: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, ...]:
        return (7, 11, *prompt.token_ids)


def test_a_policy_learns_over_two_turns():
    engine = FakeEngine(seed=1)
    run, memory = training("fiberpo", engine=engine, trainer={"steps": 12})
    run.source.generator = generator(engine, TryAgain(), encoder=AskedTheSame())
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
    prompt = Prompt(0, 0, (5, 6), "p", Task("p", "1"))
    rollouts = flatten([RolloutGroup(prompt, (Trajectory(prompt, completion, "t", 1.0, True),))])
    micro_batches = pack(rollouts, [[0]], sequence_multiple=4)
    policy = TablePolicy(1.0)
    policy.step(micro_batches, lambda log_probs, part: Coefficients(torch.ones_like(log_probs)), 1.0)
    moved = policy.table.detach().abs().sum(1).nonzero()[:, 0].tolist()
    assert moved == [1, 3, 6, 9]  # 6 -> 1 -> 2, then 7 8 9 are the environment's, 9 -> 3 -> 4


def test_every_turn_must_come_from_the_published_weights():
    class Stale(FakeEngine):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: object) -> list[Completion]:
            version = "1" if len(prompt) == 1 else "0"
            spans = (WeightSpan(version, 0, 1),)
            return [Completion((9,), np.array([-1.0], np.float32), "stop", spans) for _ in seeds]

    groups = generator(Stale(seed=0), TryAgain(), encoder=Words(between=(7,))).groups
    prompt = Prompt(0, 0, (3,), "p", Task("p", "8"))
    with pytest.raises(RuntimeError, match=r"sampled with weights \['0'\], but only \['1'\] may be in it"):
        list(groups([prompt], 2, "1", lambda: False))
