"""No trajectory waits for another one: neither for a turn of it, nor for its tools, nor for its end."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fiberpo_megatron.environments import Conversation, Environment, Outcome, SingleTurn, Task, ToolCall, Turn
from fiberpo_megatron.environments.builtin.tools import Tools
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.rollout.generator import Generator
from fiberpo_megatron.trainer.batch import mini_batches
from fiberpo_megatron.trainer.optimise import ObjectiveGate
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.types import Completion, RolloutGroup, flatten
from tests.rollout.test_generator import Seeded, never
from tests.trainer.toy import LOOP, SingleLayout, Words, generator, one_prompt, running

WAIT_S = 30.0
"""A barrier would make these tests wait for ever; they fail after this time instead."""


class OneIsSlow(Environment):
    """Talks for three turns; the tool of one trajectory is not done before `go_on` is set."""

    train_size = 10

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.others = threading.Event()
        self.ended: Counter[str] = Counter()
        self._first = True

    async def run(self, task: Task, policy: Conversation) -> Outcome:
        await policy.say(task.prompt)
        slow, self._first = self._first, False
        if slow:
            assert await asyncio.to_thread(self.go_on.wait, WAIT_S), "the slow tool was never released"
        for _ in range(2):
            await policy.say("go on")
        self.ended[str(task.id)] += 1
        if self.ended.total() == 5:
            self.others.set()
        return Outcome(float(slow), correct=slow)


def test_a_slow_tool_holds_up_neither_the_turns_of_others_nor_other_groups():
    environment = OneIsSlow()
    prompts = [one_prompt(0), one_prompt(1)]
    groups = generator(Seeded(), environment).groups(prompts, 3, "0", never)
    index, group = next(groups)  # a whole group comes while a tool of the other one works
    assert environment.others.wait(WAIT_S), "another trajectory waited for the slow one"
    assert len(group.trajectories) == 3 and environment.ended.total() == 5
    environment.go_on.set()
    (rest,) = groups
    assert {index, rest[0]} == {0, 1} and [t.reward for t in rest[1].trajectories].count(1.0) == 1


class ScoresWhileOthersAreSampled(SingleTurn):
    """Sets an event when it has scored two answers."""

    train_size = 10

    def __init__(self) -> None:
        self.scored = 0
        self.two = threading.Event()

    def score(self, task: Task, turn: Turn) -> float:
        self.scored += 1
        if self.scored == 2:
            self.two.set()
        return 1.0


def test_an_answer_is_scored_while_others_to_the_same_prompt_are_sampled():
    environment = ScoresWhileOthersAreSampled()

    class LastIsSlow(Seeded):
        requests = 0

        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **options: Any) -> list[Completion]:
            self.requests += 1
            if self.requests == 3:
                assert await asyncio.to_thread(environment.two.wait, WAIT_S), "the other answers waited for this one"
            return await super().sample(prompt, seeds, **options)

    ((_, group),) = generator(LastIsSlow(), environment).groups([one_prompt(0)], 3, "0", never)
    assert [t.reward for t in group.trajectories] == [1.0] * 3


def hold(name: str) -> str:
    """Wait until the policy has answered everywhere else."""
    assert RELEASED.wait(WAIT_S)
    return name


def now() -> str:
    """Return at once."""
    return "now"


RELEASED = threading.Event()


def test_turns_with_tools_are_keys_of_an_objective_and_each_is_weighted_by_itself(tmp_path: Path):
    """The first trajectory calls a slow tool, the others a quick one or none: groups of one to two turns."""
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "a", "answer": "7"}) + "\n")
    names = [f"tests.rollout.test_no_barrier:{name}" for name in ("hold", "now")]
    environment = Tools(str(data), tools=names, tool_timeout_s=WAIT_S)
    calls = {0: "hold", 1: "now", 2: None}
    finished: list[int] = []

    def answer(prompt: Sequence[int], seed: int) -> tuple[int, ...]:
        if len(prompt) > 3:  # the second turn of a trajectory
            finished.append(prompt[3])
            if len(finished) == 1:
                RELEASED.set()  # `now` went on although `hold` had not returned
            return 7, 8
        number = numbers.setdefault(seed, len(numbers))
        return number, number, number

    async def parse(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[ToolCall, ...]]:
        name = calls.get(int(text.split()[0])) if len(text.split()) == 3 else None
        return text, () if name is None else (ToolCall(name, '{"name": "x"}' if name == "hold" else "{}"),)

    numbers: dict[int, int] = {}
    RELEASED.clear()
    prompt = replace(one_prompt(0), token_ids=(1, 2, 3), task=environment.train(0))
    here = running(environment)
    talks = replace(here, description=replace(here.description, single_turn=environment.single_turn))
    found = Generator(Seeded(answer), [talks], Words(between=(9,)), LOOP, seed=0, parse_tools=parse)
    ((_, group),) = found.groups([prompt], 3, "0", never)
    assert finished == [1, 0], "the quick tool's trajectory has gone on before the slow one's"
    check_turn_level(group)


def check_turn_level(group: RolloutGroup) -> None:
    """Every turn is a fibre of its own inside of its trajectory, and what drifts in one turn is bounded there."""
    assert [len(t.completion.token_ids) for t in group.trajectories] == [6, 6, 3]
    rollouts = flatten([group])
    (part,) = mini_batches(
        rollouts,
        np.array([1.0, -1.0, 1.0], np.float32),
        batch=BatchConfig(prompts=1, micro_batch_tokens=32),
        weighting="seq-mean",
        domains=1,
        layout=SingleLayout(),
        version=0,
    )
    tokens = torch.cat([m.response_tokens for m in part.micro_batches])
    order = torch.argsort(tokens)
    assert part.keys["turn"][order].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]
    assert part.keys["trajectory"][order].tolist() == [0] * 5 + [1] * 5 + [2] * 3
    gate = ObjectiveGate(
        build_objective("fiberpo", levels=[["turn"], ["trajectory"]], budgets={"turn": (0.4, 0.3)}),
        part,
        torch.zeros(len(tokens)),
        None,
    )

    def coefficients(drifts: Mapping[int, float]) -> torch.Tensor:
        """The coefficients of all tokens, in order, where the tokens of some turns have drifted."""
        x = torch.tensor([drifts.get(int(turn), 0.0) for turn in part.keys["turn"]])
        return gate(x, slice(0, len(x))).gradient[order]

    still, drifted = coefficients({}), coefficients({1: 3.0})
    assert torch.equal(still[5:], drifted[5:]), "other trajectories do not notice"
    assert not torch.allclose(still[3:5], drifted[3:5]), "the turn that drifted is clipped"
