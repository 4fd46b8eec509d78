"""One trajectory in the making: its tokens, its seeds, what may be said, and how its turns are joined."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fiberpo_megatron.environments import Message, Task, ToolCall, Turn
from fiberpo_megatron.interfaces import SamplingChange, Segments
from fiberpo_megatron.rollout.conversation import PolicyConversation, join_turns, response_seeds
from fiberpo_megatron.rollout.segments import RoutesMissing
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import Completion, Prompt, WeightSpan

END, OTHER_END = 1, 2
PROMPT = Prompt(0, 0, (100, 101), "p0", Task("p0", "8", id="0"))
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def turn(*ids: int, reason: str = "stop", version: str = "3", experts: np.ndarray | None = None) -> Completion:
    log_probs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Completion(ids, log_probs, reason, (WeightSpan(version, 0, len(ids)),), experts)


class Scripted:
    """An engine whose answers are written down, and what it was asked."""

    def __init__(self, *answers: Completion | Exception) -> None:
        self.answers = list(answers)
        self.prefixes: list[list[int]] = []
        self.seeds: list[int] = []
        self.limits: list[tuple[int | None, tuple[int, ...]]] = []
        self.known_routes: list[int] = []

    async def sample(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
        change: SamplingChange | None = None,
        priority: int = 0,
        track: Track | None = None,
        known_routes: int = 0,
        segments: Segments | None = None,
    ) -> list[Completion]:
        (seed,) = seeds
        self.known_routes.append(known_routes)
        self.prefixes.append(list(prompt))
        self.seeds.append(seed)
        self.limits.append((max_tokens, tuple(stop_token_ids)))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    def score(self, token_ids: Sequence[int]) -> dict[int, Any]:
        raise AssertionError("nobody asks for scores")


class Numbers:
    """Writes a message as 50, the number at its end, 51; tokens are their own text."""

    def __init__(self) -> None:
        self.tools: list[Any] = []

    def first(self, prompt: Prompt, new: str | Sequence[Message], tools: Any) -> tuple[int, ...]:
        self.tools.append(tools)
        return prompt.token_ids if new == prompt.task.prompt else (200, 201, 202)

    def following(
        self, prompt: Prompt, response_ids: Sequence[int], new: str | Sequence[Message], tools: Any
    ) -> tuple[int, ...]:
        self.tools.append(tools)
        if response_ids[-1] != END:
            raise ValueError("the policy did not end its turn")
        said = new if isinstance(new, str) else new[-1]["content"]
        return 50, int(said.split()[-1]), 51

    def text(self, token_ids: Sequence[int], stop: Sequence[str] = (), special: bool = False) -> str:
        return " ".join(str(i) for i in token_ids if i not in (END, OTHER_END))

    def tokens_with(self, characters: Sequence[str]) -> tuple[int, ...]:
        return tuple(map(ord, characters))


def conversation(sampler: Scripted, prompt: Prompt = PROMPT, sample: int = 0, **parts: Any) -> PolicyConversation:
    parts = {"seed": 11, "encoder": Numbers(), "check": lambda prompt, completion: None} | parts
    return PolicyConversation(prompt, sample, sampler=sampler, **parts)


def said(found: PolicyConversation, *calls: Any, **options: Any) -> list[Turn]:
    """What the policy answers to these words, one after the other."""

    async def talk() -> list[Turn]:
        return [await found.say(words, **options) for words in calls]

    return asyncio.run(talk())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_each_turn_continues_the_tokens_that_were_sampled():
    engine = Scripted(turn(5, END), turn(7, END), turn(8, reason="length"))
    found = conversation(engine)
    turns = said(found, "p0", [user("not 5")], user("not 7"))
    assert [(t.text, t.finish_reason, t.token_ids) for t in turns] == [
        ("5", "stop", (5, END)), ("7", "stop", (7, END)), ("8", "length", (8,))
    ]  # fmt: skip
    assert engine.prefixes == [
        [100, 101], [100, 101, 5, END, 50, 5, 51], [100, 101, 5, END, 50, 5, 51, 7, END, 50, 7, 51]
    ]  # fmt: skip
    assert found.prompt_ids == PROMPT.token_ids
    assert found.response_ids == [5, END, 50, 5, 51, 7, END, 50, 7, 51, 8]
    assert found.completion.token_ids == tuple(found.response_ids) and found.completion.finish_reason == "length"
    assert found.completion.loss_mask.tolist() == [True] * 2 + [False] * 3 + [True] * 2 + [False] * 3 + [True]
    assert found.text == "5\n[user] not 5\n[assistant] 7\n[user] not 7\n[assistant] 8"


def test_a_conversation_of_one_turn_is_what_the_engine_returned():
    engine = Scripted(turn(5, END))
    found = conversation(engine)
    said(found, "p0")
    assert found.completion is found.turns[0] and found.completion.loss_mask is None and found.text == "5"


def test_it_may_begin_with_another_prompt_than_the_tasks():
    engine = Scripted(turn(5, END), turn(6, END))
    found = conversation(engine)
    said(found, [user("another question")], "and 9")
    assert found.prompt_ids == (200, 201, 202)
    assert engine.prefixes == [[200, 201, 202], [200, 201, 202, 5, END, 50, 9, 51]]
    assert found.text == "5\nand 9\n[assistant] 6"


def test_seeds_depend_on_the_prompts_seed_the_sample_and_the_turn_alone():
    def seeds(seed: int, sample: int, answers: int = 5) -> list[int]:
        engine = Scripted(*[turn(answers, END)] * 3)
        said(conversation(engine, sample=sample, seed=seed), "p0", "1", "2")
        return engine.seeds

    every = [seed for s in (11, 12) for sample in range(2) for seed in seeds(s, sample)]
    assert len(set(every)) == len(every) and all(0 <= seed < 2**63 for seed in every)
    assert seeds(11, 1) == seeds(11, 1, answers=6)
    # the first turn's are those of prompts that are sampled in one request
    assert [seeds(11, sample)[0] for sample in range(3)] == response_seeds(11, 3)


def test_limits_of_a_turn_reach_the_engine_and_its_text():
    engine = Scripted(turn(7, 44, 8, END), turn(6, END))
    found = conversation(engine)

    async def talk() -> list[Turn]:
        return [await found.say("p0", max_tokens=4, stop=[","]), await found.say("1")]

    first, second = asyncio.run(talk())
    assert engine.limits == [(4, (ord(","),)), (None, ())]
    assert (first.text, second.text) == ("7 44 8", "6")


def test_the_text_ends_before_the_character_that_stopped_the_turn():
    class Letters(Numbers):
        def text(self, token_ids: Sequence[int], stop: Sequence[str] = (), special: bool = False) -> str:
            return "".join(map(chr, token_ids)).split(stop[0])[0] if stop else "".join(map(chr, token_ids))

    engine = Scripted(turn(*map(ord, "12;3")))
    (found,) = said(conversation(engine, encoder=Letters()), "p0", stop=[";"])
    assert (found.text, found.token_ids) == ("12", tuple(map(ord, "12;3")))


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("", {}, "there is nothing to say"),
        ([], {}, "there is nothing to say"),
        ([{"content": "no role"}], {}, "is neither a text nor chat messages with a `role`"),
        (["text"], {}, "is neither a text nor chat messages"),
        ("p0", {"max_tokens": 0}, "max_tokens = 0; pass at least 1"),
        ("p0", {"stop": ["ab"]}, r"stop = \['ab'\]; pass single characters"),
        ("p0", {"stop": [""]}, "pass single characters"),
        ("p0", {"tools": TOOLS}, "tools need rollout.tool_call_parser"),
    ],
)
def test_what_cannot_be_said_first_is_refused(words, options, message):
    engine = Scripted(turn(5, END))
    found = conversation(engine)
    with pytest.raises(ValueError, match=f"say: .*{message}"):
        said(found, words, **options)
    assert not engine.prefixes and not found.turns
    said(found, "p0")  # the conversation can go on


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("", {}, "there is nothing to say"),
        ([{"role": "assistant", "content": "5"}, user("6")], {}, "pass only what is new; the policy's own answers"),
        ("again 1", {"tools": TOOLS}, "the tools must be given with the first call and stay the same"),
        ("again 1", {"max_tokens": -1}, "max_tokens = -1"),
    ],
)
def test_what_cannot_be_said_later_is_refused(words, options, message):
    async def parse(text: str, tools: Any) -> tuple[str, tuple[ToolCall, ...]]:
        return text, ()

    engine = Scripted(turn(5, END), turn(6, END))
    found = conversation(engine, parse_tools=parse)
    said(found, "p0")
    with pytest.raises(ValueError, match=f"say: .*{message}"):
        said(found, words, **options)
    assert len(engine.prefixes) == 1 and found.response_ids == [5, END]
    said(found, "again 6")
    assert found.response_ids == [5, END, 50, 6, 51, 6, END]


def test_the_parser_of_tool_calls_sees_special_tokens():
    class Marked(Numbers):
        def text(self, token_ids: Sequence[int], stop: Sequence[str] = (), special: bool = False) -> str:
            return ("[TOOL_CALLS] " if special else "") + super().text(token_ids)

    async def parse(text: str, tools: Any) -> tuple[str, tuple[ToolCall, ...]]:
        return text.removeprefix("[TOOL_CALLS] "), (ToolCall("add", "{}"),) if "[TOOL_CALLS]" in text else ()

    (called,) = said(conversation(Scripted(turn(5, END)), encoder=Marked(), parse_tools=parse), "p0", tools=TOOLS)
    (said_only,) = said(conversation(Scripted(turn(5, END)), encoder=Marked(), parse_tools=parse), "p0")
    assert (called.text, len(called.tool_calls)) == ("5", 1) and (said_only.text, said_only.tool_calls) == ("5", ())


def test_a_prompt_may_hold_an_answer_of_its_own():
    """Only before the first turn: an example in the prompt was not sampled from this policy."""
    engine = Scripted(turn(5, END))
    history = [user("1+1"), {"role": "assistant", "content": "2"}, user("2+2")]
    said(conversation(engine), history)
    assert engine.prefixes == [[200, 201, 202]]


def test_nothing_follows_a_turn_that_ended_otherwise():
    engine = Scripted(turn(5, OTHER_END))
    found = conversation(engine)
    said(found, "p0")
    with pytest.raises(ValueError, match="did not end its turn"):
        said(found, "again 1")
    assert found.response_ids == [5, OTHER_END] and found.text == "5" and len(engine.prefixes) == 1
    assert found.completion is found.turns[0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_turn_that_fails_leaves_no_trace(failing):
    class Fails(RuntimeError):
        pass

    def check(prompt: Prompt, completion: Completion) -> None:
        if completion.token_ids == (6, END):
            raise Fails("of other weights")

    answers: list[Completion | Exception] = [turn(5, END), turn(5, END)]
    for problem in (Fails("the engine died"), turn(6, END)):
        answers[failing] = problem
        found = conversation(Scripted(*answers), check=check)
        if failing:
            said(found, "p0")
        with pytest.raises(Fails):
            said(found, "p0" if not failing else "again 1")
        assert found.response_ids == [5, END][: 2 * failing] and len(found.said) == len(found.between) == 0
        assert len(found.turns) == len(found.texts) == failing


def test_tools_are_described_at_first_and_parsed_in_every_turn():
    parsed: list[tuple[str, Sequence[Mapping[str, Any]]]] = []

    async def parse(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[ToolCall, ...]]:
        parsed.append((text, tools))
        return ("around", (ToolCall("add", "{}", "call_0"),)) if text == "5" else (text, ())

    encoder = Numbers()
    found = conversation(Scripted(turn(5, END), turn(6, END), turn(7, END)), encoder=encoder, parse_tools=parse)

    async def talk() -> list[Turn]:
        return [
            await found.say("p0", tools=TOOLS),
            await found.say({"role": "tool", "content": "41"}),
            await found.say([user("42")], tools=[dict(tool) for tool in TOOLS]),
        ]

    first, second, third = asyncio.run(talk())
    assert (first.text, first.tool_calls, first.token_ids) == ("around", (ToolCall("add", "{}", "call_0"),), (5, END))
    assert (second.text, second.tool_calls) == ("6", ()) and third.text == "7"
    assert parsed == [("5", TOOLS), ("6", TOOLS), ("7", TOOLS)] and encoder.tools == [TOOLS] * 3
    assert found.response_ids == [5, END, 50, 41, 51, 6, END, 50, 42, 51, 7, END]
    assert found.text == "5\n[tool] 41\n[assistant] 6\n[user] 42\n[assistant] 7"


def test_without_tools_nothing_is_parsed():
    async def parse(text: str, tools: Any) -> tuple[str, tuple[ToolCall, ...]]:
        raise AssertionError("there are no tools")

    said(conversation(Scripted(turn(5, END)), parse_tools=parse), "p0")


def test_joined_turns_mask_what_the_environment_wrote():
    joined = join_turns([turn(5, 6, END), turn(8, END, reason="length", version="4")], [(50, 51)])
    assert joined.token_ids == (5, 6, END, 50, 51, 8, END)
    assert joined.loss_mask.tolist() == [True, True, True, False, False, True, True]
    assert joined.log_probs.tolist() == [-1, -2, -3, 0, 0, -1, -2] and joined.log_probs.dtype == np.float32
    assert joined.weight_spans == (WeightSpan("3", 0, 3), WeightSpan("4", 5, 7))
    assert joined.finish_reason == "length" and joined.routed_experts is None
    assert joined.engines.tolist() == [0, 0, 0, -1, -1, 0, 0]


def test_joined_turns_take_experts_from_the_pass_that_sampled():
    """With a prompt of 2 tokens the first answer has experts of its first 2 + 2 - 1 positions, the second of the others
    but the last: END of the first turn, 50, and 8."""
    first, second = (np.full((rows, 1, 2), value, np.int32) for rows, value in ((3, 1), (3, 2)))
    joined = join_turns([turn(5, END, experts=first), turn(8, END, experts=second)], [(50,)])
    assert joined.routed_experts[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert len(joined.routed_experts) == 2 + len(joined.token_ids) - 1


@pytest.mark.parametrize(("rows", "position"), [(2, 5), (4, 6), (None, 3)])
def test_a_turn_without_the_experts_of_its_tokens_ends_the_run(rows: int | None, position: int):
    first = np.zeros((3, 1, 2), np.int32)
    second = None if rows is None else np.zeros((rows, 1, 2), np.int32)
    with pytest.raises(RoutesMissing, match=rf"answer 1 of 2 .* position {position} has none or two"):
        join_turns([turn(5, END, experts=first), turn(8, END, experts=second)], [(50,)])


def test_an_engine_is_asked_for_the_experts_of_what_is_new():
    """The prompt p0 is one token; behind the turns 5 END and 8 END stand what the environment says."""
    engine = Scripted(turn(5, END), turn(8, END), turn(9, END))
    said(conversation(engine), "p0", "1", "2")
    assert engine.known_routes == [0, *(len(before) + 1 for before in engine.prefixes[:2])]


def test_joined_turns_say_which_engine_sampled_them():
    first, second = (replace(turn(5, END), engines=np.full(2, engine, np.int16)) for engine in (3, 1))
    joined = join_turns([first, second], [(50,)])
    assert joined.engines.tolist() == [3, 3, -1, 1, 1] and joined.engines.dtype == np.int16


def test_turns_and_what_stands_between_them_must_fit():
    with pytest.raises(ValueError, match="shorter"):
        join_turns([turn(5, END), turn(6, END), turn(7, END)], [(50,)])
