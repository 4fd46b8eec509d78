"""Branches of a trajectory: whose tokens are context, which seeds they have, and what the trainer gets of them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from fiberpo_megatron.environments.jobs import BranchPoint
from fiberpo_megatron.rollout.branches import BranchedConversation
from fiberpo_megatron.rollout.conversation import PolicyConversation
from fiberpo_megatron.types import Branch, Completion
from tests.rollout.test_conversation import END, PROMPT, Numbers, Scripted, turn, user


def branched(engine: Scripted, **parts: Any) -> BranchedConversation:
    def begin(**fields: Any) -> PolicyConversation:
        return PolicyConversation(PROMPT, 0, 11, Numbers(), engine, lambda p, c: None, **parts, **fields)

    return BranchedConversation(begin)


def talked(found: BranchedConversation, *words: tuple[Any, BranchPoint | None]) -> list[Any]:
    async def talk() -> list[Any]:
        return [await found.say(new, branch=branch or BranchPoint(0, 0, 0)) for new, branch in words]

    return asyncio.run(talk())


def test_a_fork_goes_on_behind_the_sampled_tokens_and_trains_its_own_alone():
    engine = Scripted(turn(5, END), turn(7, END), turn(8, END), turn(9, END))
    found = branched(engine)
    fork = BranchPoint(1, 0, 1)
    turns = talked(found, ("p0", None), ([user("6")], None), ([user("3")], fork), ([user("4")], fork))
    assert engine.prefixes[2:] == [
        [100, 101, 5, END, 50, 3, 51], [100, 101, 5, END, 50, 3, 51, 8, END, 50, 4, 51]
    ]  # fmt: skip
    assert [t.prompt_tokens for t in turns] == [2, 7, 7, 12] and found.turns == turns
    (branch,) = found.branches
    assert branch.prompt_ids == (100, 101, 5, END, 50, 3, 51)
    assert branch.completion.token_ids == (8, END, 50, 4, 51, 9, END)
    assert branch.sampled.tolist() == [True] * 2 + [False] * 3 + [True] * 2
    assert found.first is not None and found.first.completion.token_ids == (5, END, 50, 6, 51, 7, END)
    assert found.text == "5\n[user] 6\n[assistant] 7\n[branch 1]\n8\n[user] 4\n[assistant] 9"


def test_a_fork_of_a_fork_and_a_branch_with_its_own_prompt():
    engine = Scripted(*(turn(i, END) for i in (5, 7, 8)))
    found = branched(engine)
    talked(found, ("p0", None), ([user("3")], BranchPoint(2, 0, 1)), ([user("4")], BranchPoint(5, 2, 1)))
    assert engine.prefixes[2] == [100, 101, 5, END, 50, 3, 51, 7, END, 50, 4, 51]
    engine.answers = [turn(6, END)]
    example = [user("1"), {"role": "assistant", "content": "2"}, user("3")]
    talked(found, (example, BranchPoint(3, 0, 0)))
    assert engine.prefixes[3] == [200, 201, 202]
    assert [b.completion.token_ids[0] for b in found.branches] == [7, 6, 8], "in the order of their numbers"


def test_seeds_depend_on_the_branch_and_no_branch_takes_those_of_the_first():
    def seeds(*numbers: int) -> list[int]:
        engine = Scripted(*[turn(5, END)] * 9)
        found = branched(engine)
        talked(found, *(("p0", BranchPoint(n, 0, 0)) for n in numbers), *(("1", BranchPoint(n, 0, 0)) for n in numbers))
        return engine.seeds

    assert len(set(seeds(0, 1, 2, 3))) == 8
    assert seeds(0, 1)[0::2] == seeds(0)[:2], "the first sequence's are those of a conversation without branches"


def test_branches_speak_at_the_same_time():
    gates = [asyncio.Event() for _ in range(2)]

    class Waiting(Scripted):
        async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: Any) -> list[Completion]:
            answer = await super().sample(prompt, seeds, **limits)
            await gates[answer[0].token_ids[0]].wait()
            return answer

    async def talk() -> BranchedConversation:
        found = branched(Waiting(turn(0, END), turn(1, END)))
        first = asyncio.create_task(found.say("p0"))
        second = asyncio.create_task(found.say("p0", branch=BranchPoint(1, 0, 0)))
        gates[1].set()
        await second
        assert not first.done()
        gates[0].set()
        await first
        return found

    found = asyncio.run(talk())
    assert [t.token_ids[0] for t in found.turns] == [1, 0]
    assert found.first is not None and found.first.completion.token_ids[0] == 0


def test_a_branch_in_which_nothing_was_said_is_none():
    class Refuses(Numbers):
        def following(self, *arguments: Any) -> tuple[int, ...]:
            raise ValueError("the policy did not end its turn")

    engine = Scripted(turn(5))
    found = branched(engine)
    talked(found, ("p0", None))
    with pytest.raises(ValueError, match="did not end its turn"):
        talked(found, ([user("3")], BranchPoint(1, 0, 1)))
    with pytest.raises(ValueError, match="branch 0 has 1 turns, not 2"):
        talked(found, ([user("3")], BranchPoint(2, 0, 2)))
    with pytest.raises(ValueError, match="pass only what is new"):
        talked(found, ([{"role": "assistant", "content": "6"}], BranchPoint(1, 0, 1)))
    assert found.branches == () and len(engine.prefixes) == 1


def test_the_first_sequence_is_the_first_in_which_something_was_said():
    engine = Scripted(turn(5, END), turn(6, END))
    found = branched(engine)
    talked(found, ("p0", BranchPoint(1, 0, 0)), ("p0", BranchPoint(2, 0, 0)))
    assert found.first is not None and found.first.turns[0].token_ids == (5, END)
    assert [type(b) for b in found.branches] == [Branch]


def test_a_sequence_grows_no_longer_than_it_may():
    engine = Scripted(turn(5, END), turn(6, END))
    found = branched(engine, longest=9)
    talked(found, ("p0", None), ("3", None))
    assert [limit for limit, _ in engine.limits] == [7, 2]
    with pytest.raises(ValueError, match="12 tokens and no room for an answer, because a sequence may have 9"):
        talked(found, ("4", None))
    assert len(engine.prefixes) == 2
