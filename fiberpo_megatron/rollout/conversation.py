"""Conversations: an environment answers the policy's turns, and what it writes takes no part in the loss.

The token ids of a turn are those that the engine sampled; nothing of a conversation is tokenised a second time. Only
the environment's message, with the template around it, is turned into tokens, once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.types import Completion, Prompt, WeightSpan

Sample = Callable[[Sequence[Sequence[int]], int, Sequence[int]], Iterator[tuple[int, list[Completion]]]]
"""(prompts as token ids, completions of each, one seed per prompt) -> (index of a prompt, its completions), each prompt
once, as they are finished."""
Continuation = Callable[[Prompt, Sequence[int], str], tuple[int, ...] | None]
"""(prompt, response token ids so far, user message) -> token ids from there to the policy's next turn; None when the
response did not end its turn, so that no other can follow."""


class Environment(Protocol):
    """Answers the policy's turns."""

    def reply(self, prompt: Prompt, turns: Sequence[str], sample: int) -> str | None:
        """The user message after the policy's `turns` (texts) in the `sample`-th response to `prompt`; None ends the
        conversation."""
        ...


@dataclass(frozen=True)
class Dialogue:
    """What makes a response more than one turn."""

    environment: Environment
    continuation: Continuation


@dataclass
class Conversation:
    """One response in the making."""

    prompt: Prompt
    sample: int
    """Which of the prompt's responses it is."""
    seed: int
    """Of its prompt."""
    turns: list[Completion] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Of the turns."""
    between: list[tuple[int, ...]] = field(default_factory=list)
    """Tokens after each turn but the last."""
    messages: list[str] = field(default_factory=list)
    """The environment's, after each turn but the last."""

    @property
    def response_ids(self) -> list[int]:
        """Everything after the prompt."""
        ids: list[int] = []
        for turn, after in zip(self.turns, [*self.between, ()]):
            ids += [*turn.token_ids, *after]
        return ids

    @property
    def completion(self) -> Completion:
        """The turns joined."""
        return join_turns(self.turns, self.between)

    @property
    def text(self) -> str:
        """Of all turns, for people."""
        parts = self.texts[:1]
        for message, text in zip(self.messages, self.texts[1:]):
            parts += [f"[user] {message}", f"[assistant] {text}"]
        return "\n".join(parts)


def converse(
    sample: Sample,
    prompts: Sequence[Prompt],
    count: int,
    seeds: Sequence[int],
    *,
    decode: Callable[[Sequence[int]], str],
    dialogue: Dialogue | None = None,
) -> Iterator[tuple[int, list[Conversation]]]:
    """(index of a prompt, its `count` conversations), as groups are finished; without dialogue they have one turn.

    All conversations that go on are sampled together, turn by turn: a turn begins when the slowest response of the
    one before has ended. A turn that was cut by the length limit is the last. `seeds`: one per prompt.

    Raises ValueError when the engine left a request without its answers.
    """
    groups = [[Conversation(p, i, seed) for i in range(count)] for p, seed in zip(prompts, seeds, strict=True)]
    going = [count] * len(prompts)  # conversations of each prompt that have not ended
    asked = [(index, group) for index, group in enumerate(groups)]
    answers = sample([p.token_ids for p in prompts], count, seeds)
    while asked:
        again: list[tuple[int, Conversation]] = []
        for request, completions in answers:
            index, conversations = asked[request]
            for conversation, completion in zip(conversations, completions, strict=True):
                conversation.turns.append(completion)
                conversation.texts.append(decode(completion.token_ids))
                if dialogue is not None and _goes_on(conversation, dialogue):
                    again.append((index, conversation))
                else:
                    going[index] -= 1
            if going[index] == 0:
                yield index, groups[index]
        again.sort(key=lambda place: (place[0], place[1].sample))  # they came in the order in which they ended
        asked = [(index, [conversation]) for index, conversation in again]
        if asked:
            prefixes = [[*c.prompt.token_ids, *c.response_ids] for _, c in again]
            answers = sample(prefixes, 1, [_turn_seed(c) for _, c in again])
    if any(going):
        raise ValueError(f"the engine left prompts {[i for i, left in enumerate(going) if left]} without an answer")


def join_turns(turns: Sequence[Completion], between: Sequence[Sequence[int]]) -> Completion:
    """The turns and the tokens between them as one completion, whose loss mask covers the turns alone.

    Every turn's own log-probs and weight versions are kept. An engine's answer has the experts of its prompt as well:
    each position takes them from the first answer that has it, which is the one that sampled its successor.
    """
    if len(turns) == 1:
        return turns[0]
    token_ids: list[int] = []
    log_probs = [np.zeros(0, np.float32)]
    mask: list[bool] = []
    spans: list[WeightSpan] = []
    for turn, after in zip(turns, [*between, ()], strict=True):
        start = len(token_ids)
        spans += [replace(span, start=start + span.start, end=start + span.end) for span in turn.weight_spans]
        token_ids += [*turn.token_ids, *after]
        log_probs += [turn.log_probs, np.zeros(len(after), np.float32)]
        mask += [True] * len(turn.token_ids) + [False] * len(after)
    return Completion(
        tuple(token_ids),
        np.concatenate(log_probs),
        turns[-1].finish_reason,
        tuple(spans),
        _join_experts([turn.routed_experts for turn in turns]),
        np.array(mask),
    )


def _join_experts(answers: Sequence[NDArray[np.int32] | None]) -> NDArray[np.int32] | None:
    joined = answers[-1]
    if joined is None:
        return None
    joined = joined.copy()
    for experts in reversed(answers[:-1]):
        if experts is None:
            return None
        joined[: len(experts)] = experts
    return joined


def _goes_on(conversation: Conversation, dialogue: Dialogue) -> bool:
    """Whether there is another turn; the tokens before it are then added."""
    if conversation.turns[-1].finish_reason != "stop":
        return False
    message = dialogue.environment.reply(conversation.prompt, conversation.texts, conversation.sample)
    if message is None:
        return False
    tokens = dialogue.continuation(conversation.prompt, conversation.response_ids, message)
    if tokens is None:
        return False
    conversation.between.append(tokens)
    conversation.messages.append(message)
    return True


def _turn_seed(conversation: Conversation) -> int:
    """Sampling seed of the next turn: engines take 31 bits."""
    name = f"{conversation.seed} {conversation.sample} {len(conversation.turns)}".encode()
    return int.from_bytes(blake2b(name, digest_size=4).digest(), "big") >> 1
