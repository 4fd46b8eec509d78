"""A tokenizer's chat template: prompts, and the tokens between an assistant's turn and its next one."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from fiberpo_megatron.data.tokenizer import Tokenizer

Message = Mapping[str, str]

QUESTION, ANSWER, REPLY = "placeholder-question", "placeholder-answer", "placeholder-reply"
"""Contents with which the template is asked what it writes around them."""
TURN: tuple[Message, ...] = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER})


class ChatTemplate:
    """The template of one tokenizer. `options`: variables of the template, such as enable_thinking or tools.

    A conversation is never rendered again once the policy has answered: what a template writes between two turns is
    found on placeholders, and its tokens are put behind those that were sampled.
    """

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options or {})

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text before the assistant's answer to `messages`, special tokens included. Raises what the template
        raises."""
        return self._render(messages, generation_prompt=True)

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token that the template writes after an assistant's answer; None when there is none."""
        _, _, after = self._render(TURN, generation_prompt=False).partition(ANSWER)
        ids = self._tokenizer.encode(after.lstrip(), add_special_tokens=False)
        return ids[0] if ids and not self._tokenizer.decode(ids[:1], skip_special_tokens=True) else None

    def check_turns(self) -> None:
        """ValueError when conversations of several turns cannot be continued token by token."""
        reply = {"role": "user", "content": REPLY}
        first, second = (
            self._render([*TURN * turns, reply], generation_prompt=True).split(ANSWER)[-1] for turns in (1, 2)
        )
        if first != second or REPLY not in first:
            raise ValueError(
                f"the chat template writes {first!r} between a first and a second answer, {second!r} between a second "
                "and a third; conversations cannot be continued with it: set max_turns = 1"
            )
        end = self._tokenizer.encode(first.lstrip(), add_special_tokens=False)[0]
        if self.end_of_turn is None or end != self.end_of_turn:
            raise ValueError(
                f"the chat template writes {first!r} after an answer, which does not begin with the special token that "
                "ends a turn: the engine cannot tell where an answer ends; set max_turns = 1"
            )

    def continuation(self, response_ids: Sequence[int], message: str) -> tuple[int, ...] | None:
        """Token ids from the end of turn, with which `response_ids` ends, to the assistant's next turn: the user's
        `message` and what the template writes around it. None when the response ends otherwise: it was cut, or ended
        the whole text."""
        if response_ids[-1] != self.end_of_turn:
            return None
        text = self._render([*TURN, {"role": "user", "content": message}], generation_prompt=True)
        _, _, after = text.partition(ANSWER)
        return tuple(self._tokenizer.encode(after.lstrip(), add_special_tokens=False)[1:])

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=generation_prompt, tokenize=False, **self._options
        )
