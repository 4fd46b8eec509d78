from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from fiberpo_megatron.rollout.conversation import Dialogue, converse, join_turns
from fiberpo_megatron.types import Completion, Prompt, WeightSpan

END, OTHER_END = 1, 2
PROMPTS = [Prompt(i, 0, (100 + i, 101), f"p{i}", "8") for i in range(2)]


def turn(*ids: int, reason: str = "stop", version: str = "3", experts: np.ndarray | None = None) -> Completion:
    log_probs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Completion(ids, log_probs, reason, (WeightSpan(version, 0, len(ids)),), experts)


class Scripted:
    """An engine that says what it is told, the last answer of a request first."""

    def __init__(self, *answers: list[list[Completion]]) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[list[list[int]], int, list[int]]] = []

    def __call__(
        self, prompts: Sequence[Sequence[int]], count: int, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.requests.append(([list(p) for p in prompts], count, list(seeds)))
        return reversed(list(enumerate(self.answers.pop(0))))


class UntilEight:
    """Asks again until an answer is 8, twice at most."""

    def reply(self, prompt: Prompt, turns: Sequence[str], sample: int) -> str | None:
        return None if turns[-1] == "8" or len(turns) == 3 else f"not {turns[-1]}"


def continuation(prompt: Prompt, response_ids: Sequence[int], message: str) -> tuple[int, ...] | None:
    return (50, int(message.split()[-1]), 51) if response_ids[-1] == END else None


def decode(ids: Sequence[int]) -> str:
    return " ".join(str(i) for i in ids if i not in (END, OTHER_END))


def test_conversations_go_on_until_the_environment_ends_them():
    engine = Scripted(
        [[turn(8, END), turn(5, END)], [turn(6, reason="length"), turn(7, END)]],
        [[turn(8, END)], [turn(9, END)]],
        [[turn(4, END)]],
    )
    dialogue = Dialogue(UntilEight(), continuation)
    ended = list(converse(engine, PROMPTS, 2, [11, 12], decode=decode, dialogue=dialogue))
    (first_ended, (right, second)), (last_ended, (cut, third)) = ended
    assert (first_ended, last_ended) == (0, 1)  # though the second prompt was answered first
    assert right.texts == ["8"] and right.completion is right.turns[0]
    assert cut.texts == ["6"] and cut.completion.finish_reason == "length"
    assert second.response_ids == [5, END, 50, 5, 51, 8, END] and second.text == "5\n[user] not 5\n[assistant] 8"
    assert third.response_ids == [7, END, 50, 7, 51, 9, END, 50, 9, 51, 4, END]  # its third turn is its last
    first, again, last = engine.requests
    assert first == ([[100, 101], [101, 101]], 2, [11, 12])
    assert again[:2] == ([[100, 101, 5, END, 50, 5, 51], [101, 101, 7, END, 50, 7, 51]], 1)
    assert last[0] == [[101, 101, 7, END, 50, 7, 51, 9, END, 50, 9, 51]]
    seeds = [11, 12, *again[2], *last[2]]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_turn_that_ended_the_whole_text_is_the_last():
    engine = Scripted([[turn(5, OTHER_END)], [turn(8, END)]])
    dialogue = Dialogue(UntilEight(), continuation)
    groups = dict(converse(engine, PROMPTS, 1, [11, 12], decode=decode, dialogue=dialogue))
    (ended,), (right,) = groups[0], groups[1]
    assert ended.response_ids == [5, OTHER_END] and ended.messages == [] and right.response_ids == [8, END]


def test_without_dialogue_a_response_is_what_the_engine_returned():
    answers = [[turn(5, END)], [turn(6, END)]]
    groups = list(converse(Scripted(answers), PROMPTS, 1, [11, 12], decode=decode))
    assert [(index, [c.completion for c in group]) for index, group in groups] == [(1, answers[1]), (0, answers[0])]


def test_joined_turns_mask_what_the_environment_wrote():
    joined = join_turns([turn(5, 6, END), turn(8, END, reason="length", version="4")], [(50, 51)])
    assert joined.token_ids == (5, 6, END, 50, 51, 8, END)
    assert joined.loss_mask.tolist() == [True, True, True, False, False, True, True]
    assert joined.log_probs.tolist() == [-1, -2, -3, 0, 0, -1, -2] and joined.log_probs.dtype == np.float32
    assert joined.weight_spans == (WeightSpan("3", 0, 3), WeightSpan("4", 5, 7))
    assert joined.finish_reason == "length" and joined.routed_experts is None


def test_joined_turns_take_experts_from_the_pass_that_sampled():
    """With a prompt of 2 tokens the first answer has experts of its first 2 + 2 - 1 positions, the second of all but
    the last."""
    first, second = (np.full((rows, 1, 2), value, np.int32) for rows, value in ((3, 1), (6, 2)))
    joined = join_turns([turn(5, END, experts=first), turn(8, END, experts=second)], [(50,)])
    assert joined.routed_experts[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert len(joined.routed_experts) == 2 + len(joined.token_ids) - 1 and (second == 2).all()


def test_every_request_needs_its_answers():
    with pytest.raises(ValueError, match=r"left prompts \[1\] without an answer"):
        list(converse(Scripted([[turn(5, END)]]), PROMPTS, 1, [11, 12], decode=decode))
    with pytest.raises(ValueError, match="shorter"):
        list(converse(Scripted([[turn(5, END)]] * 2), PROMPTS, 2, [11, 12], decode=decode))
