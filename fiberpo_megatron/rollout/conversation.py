"""This module makes one trajectory: it joins what the environment says and what the policy answers.

The token ids of a turn are those that the engine sampled; nothing of a conversation is tokenised a second time. Only
the environment's words, with the template around them, are turned into tokens, once, and take no part in the loss.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiberpo_megatron.environments import Message, ToolCall, Turn
from fiberpo_megatron.interfaces import ConversationEncoder, Sampler, Segments
from fiberpo_megatron.rollout.segments import join_experts
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import Completion, Prompt, WeightSpan

ParseTools = Callable[[str, Sequence[Mapping[str, Any]]], Awaitable[tuple[str, tuple[ToolCall, ...]]]]
"""(text of a turn, descriptions of tools) -> (text around the calls, the calls)."""


def response_seeds(seed: int, count: int) -> list[int]:
    """Return `count` sampling seeds of one prompt; hashed, so that neighbouring prompts share none."""
    digests = (blake2b(f"{seed}:{i}".encode(), digest_size=8).digest() for i in range(count))
    return [int.from_bytes(digest, "little") >> 1 for digest in digests]


@dataclass
class PolicyConversation:
    """It answers `Conversation.say` by sampling from the engines, and keeps the tokens of all turns.

    `seed`: that of the prompt. `sample`: which of the prompt's trajectories it is. `check`: raises for a completion
    that must not be trained on. `branch`: which of the trajectory's token sequences it is, for the seeds. `history`:
    the tokens behind which a branch goes on; empty where it begins with a prompt of its own. `tools`: those with which
    the history was written. `longest`: tokens that the policy may read and write in one sequence; None: any number.
    `priority`: that of its requests (`Sampler.sample`). `track`: gets what the trajectory does. `segments`: keeps what
    was sampled for a resumed run.
    """

    prompt: Prompt
    sample: int
    seed: int
    encoder: ConversationEncoder
    sampler: Sampler
    check: Callable[[Prompt, Completion], None]
    parse_tools: ParseTools | None = None
    branch: int = 0
    history: tuple[int, ...] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    longest: int | None = None
    priority: int = 0
    track: Track = field(default_factory=Track)
    segments: Segments | None = None
    prompt_ids: tuple[int, ...] = ()
    """The tokens before the first turn, the history among them."""
    turns: list[Completion] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Texts of the turns."""
    between: list[tuple[int, ...]] = field(default_factory=list)
    """Tokens after each turn but the last."""
    said: list[str] = field(default_factory=list)
    """What the environment said after each turn but the last, for people."""

    async def say(
        self,
        new: str | Message | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> Turn:
        """Return the policy's answer, as `environments.Conversation.say` describes."""
        words: str | Sequence[Message] = [new] if isinstance(new, Mapping) else new
        self._check_arguments(words, tools, max_tokens, stop)
        tokens: tuple[int, ...] = ()
        if self.turns:
            tokens = self.encoder.following(self.prompt, self.response_ids, words, self.tools)
        elif self.history:
            between = self.encoder.following(self.prompt, self.history, words, self.tools)
            self.prompt_ids = (*self.history, *between)
        else:
            self.prompt_ids = self.encoder.first(self.prompt, words, tools)
            self.tools = tools
        prefix = [*self.prompt_ids, *self.response_ids, *tokens]
        if self.longest is not None and len(prefix) >= self.longest:
            raise ValueError(
                f"say: the conversation has {len(prefix)} tokens and no room for an answer, because a sequence may "
                f"have {self.longest}; end it earlier, or say less"
            )
        (completion,) = await self.sampler.sample(
            prefix,
            [self._turn_seed()],
            max_tokens=self._limit(len(prefix), max_tokens),
            stop_token_ids=self.encoder.tokens_with(stop) if stop else (),
            priority=self.priority,
            track=self.track,
            known_routes=len(prefix) - len(tokens) - 1 if self.turns else 0,  # the last token was not read
            segments=self.segments,
        )
        self.check(self.prompt, completion)
        if self.turns:
            self.between.append(tokens)
            self.said.append(_readable(words))
        self.turns.append(completion)
        parse = self.parse_tools if self.tools else None
        text = self.encoder.text(completion.token_ids, stop or (), special=parse is not None)
        self.texts.append(text)
        calls: tuple[ToolCall, ...] = ()
        if parse is not None:
            text, calls = await parse(text, self.tools or ())
        return Turn(text, completion.finish_reason, completion.token_ids, calls, len(prefix))

    def _limit(self, prefix: int, max_tokens: int | None) -> int | None:
        """The largest number of tokens of a turn behind `prefix` tokens; None: that of the run."""
        if self.longest is None:
            return max_tokens
        room = self.longest - prefix
        return room if max_tokens is None else min(room, max_tokens)

    def token_ids(self, turns: int) -> tuple[int, ...]:
        """Return all tokens up to the end of the first `turns` turns."""
        parts = [self.prompt_ids]
        for turn, after in zip(self.turns[:turns], [(), *self.between]):
            parts += [after, turn.token_ids]
        return tuple(token for part in parts for token in part)

    @property
    def response_ids(self) -> list[int]:
        """These are the tokens of everything after the prompt."""
        ids: list[int] = []
        for turn, after in zip(self.turns, [*self.between, ()]):
            ids += [*turn.token_ids, *after]
        return ids

    @property
    def completion(self) -> Completion:
        """This is the completion of the joined turns."""
        return join_turns(self.turns, self.between)

    @property
    def text(self) -> str:
        """This is the text of all turns, for people."""
        parts = self.texts[:1]
        for said, text in zip(self.said, self.texts[1:]):
            parts += [said, f"[assistant] {text}"]
        return "\n".join(parts)

    def _turn_seed(self) -> int:
        """The sampling seed of the next turn; engines take 31 bits."""
        if not self.turns and not self.branch:
            return response_seeds(self.seed, self.sample + 1)[-1]
        of_branch = f"{self.branch} " if self.branch else ""
        name = f"{self.seed} {self.sample} {of_branch}{len(self.turns)}".encode()
        return response_seeds(int.from_bytes(blake2b(name, digest_size=4).digest(), "big") >> 1, 1)[0]

    def _check_arguments(
        self,
        new: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        max_tokens: int | None,
        stop: Sequence[str] | None,
    ) -> None:
        if not new:
            raise ValueError("say: there is nothing to say; pass a text or at least one message")
        if not isinstance(new, str) and not all(isinstance(m, Mapping) and "role" in m for m in new):
            raise ValueError(f"say: {new!r:.200} is neither a text nor chat messages with a `role`")
        begun = bool(self.turns or self.history)
        if not isinstance(new, str) and any(m["role"] == "assistant" for m in new) and begun:
            raise ValueError("say: pass only what is new; the policy's own answers are kept as they were sampled")
        if tools and self.parse_tools is None:
            raise ValueError("say: tools need rollout.tool_call_parser, the name of SGLang's parser for this model")
        if begun and tools is not None and tools != self.tools:
            raise ValueError("say: the tools must be given with the first call and stay the same")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"say: max_tokens = {max_tokens}; pass at least 1")
        if any(len(text) != 1 for text in stop or ()):
            raise ValueError(f"say: stop = {stop!r}; pass single characters, because engines see tokens")


def join_turns(turns: Sequence[Completion], between: Sequence[Sequence[int]]) -> Completion:
    """Return the turns and the tokens between them as one completion, whose loss mask covers the turns alone.

    Every turn's own log-probs and weight versions are kept. The first answer has the experts of the prompt as well,
    each later one those of the positions behind the tokens that the turn before has read.
    """
    if len(turns) == 1:
        return turns[0]
    token_ids: list[int] = []
    log_probs = [np.zeros(0, np.float32)]
    mask: list[bool] = []
    engines: list[NDArray[np.int16]] = []
    spans: list[WeightSpan] = []
    for turn, after in zip(turns, [*between, ()], strict=True):
        start = len(token_ids)
        spans += [replace(span, start=start + span.start, end=start + span.end) for span in turn.weight_spans]
        token_ids += [*turn.token_ids, *after]
        log_probs += [turn.log_probs, np.zeros(len(after), np.float32)]
        mask += [True] * len(turn.token_ids) + [False] * len(after)
        sampled = np.zeros(len(turn.token_ids), np.int16) if turn.engines is None else turn.engines
        engines += [sampled, np.full(len(after), -1, np.int16)]
    return Completion(
        tuple(token_ids),
        np.concatenate(log_probs),
        turns[-1].finish_reason,
        tuple(spans),
        _turn_experts(turns, between),
        np.array(mask),
        np.concatenate(engines),
    )


def _turn_experts(turns: Sequence[Completion], between: Sequence[Sequence[int]]) -> NDArray[Any] | None:
    """The experts of all positions; those of the prompt are in the first turn."""
    first = turns[0].routed_experts
    sizes = [len(after) + len(turn.token_ids) for after, turn in zip(between, turns[1:], strict=True)]
    return join_experts([turn.routed_experts for turn in turns], [0 if first is None else len(first), *sizes])


def _readable(new: str | Sequence[Message]) -> str:
    if isinstance(new, str):
        return new
    return "\n".join(f"[{message['role']}] {message.get('content', '')}" for message in new)
