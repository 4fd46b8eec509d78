"""This module uses a tokenizer's chat template: for prompts, and for the tokens between two turns of the assistant."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from fiberpo_megatron.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
"""Descriptions of tools for the template, or none."""

QUESTION, ANSWER, REPLY = "placeholder-question", "placeholder-answer", "placeholder-reply"
"""Contents with which the template is asked what it writes around them."""
NO_TURNS = "end conversations after one turn (chat: set max_turns = 1), or take another template"
TURN: tuple[Message, ...] = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER})


class ChatTemplate:
    """This is the chat template of one tokenizer. `options` are variables of the template, such as enable_thinking.

    A conversation is never rendered again once the policy has answered: what a template writes between two turns is
    found on placeholders, and its tokens are put behind those that were sampled.
    """

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        self._turns_can_follow = False

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """Return the text before the assistant's answer to `messages`, special tokens included. Raises what the
        template raises."""
        return self._render(messages, generation_prompt=True, tools=tools)

    @cached_property
    def end_of_turn(self) -> int | None:
        """This is the special token that the template writes after an assistant's answer; None when there is none."""
        _, _, after = self._render(TURN, generation_prompt=False).partition(ANSWER)
        ids = self._tokenizer.encode(after.lstrip(), add_special_tokens=False)
        return ids[0] if ids and not self._tokenizer.decode(ids[:1], skip_special_tokens=True) else None

    def check_turns(self, tools: Tools = None) -> None:
        """Raise ValueError when conversations of several turns cannot be continued token by token.

        What the template writes after an answer must not depend on the answer: neither on how many turns came before
        it, nor on a thought in it or a tool call beside it.
        """
        reply = {"role": "user", "content": REPLY}
        first, second = (
            self._render([*TURN * turns, reply], generation_prompt=True).split(ANSWER)[-1] for turns in (1, 2)
        )
        if first != second or REPLY not in first:
            raise ValueError(
                f"the chat template writes {first!r} between a first and a second answer, {second!r} between a second "
                f"and a third; {NO_TURNS}"
            )
        end = self._tokenizer.encode(first.lstrip(), add_special_tokens=False)[0]
        if self.end_of_turn is None or end != self.end_of_turn:
            raise ValueError(
                f"the chat template writes {first!r} after an answer, which does not begin with the special token that "
                f"ends a turn, so that the engine cannot tell where an answer ends; {NO_TURNS}"
            )
        thoughtful = [TURN[0], {"role": "assistant", "content": f"<think>\n{QUESTION}\n</think>\n\n{ANSWER}"}, reply]
        after_thought = self._render(thoughtful, generation_prompt=True).split(ANSWER)[-1]
        if after_thought != first:
            raise ValueError(
                f"the chat template writes {first!r} after an answer, but {after_thought!r} after an answer with a "
                f"thought; {NO_TURNS}"
            )
        self._turns_can_follow = True
        if tools:
            self._after_tools([{"role": "tool", "content": REPLY}], tools)

    def continuation(
        self, response_ids: Sequence[int], messages: str | Sequence[Message], tools: Tools = None
    ) -> tuple[int, ...] | None:
        """Return the token ids from the end of turn, with which `response_ids` ends, to the assistant's next turn: the
        new `messages` (a string is one of the user) and what the template writes around them.

        They are the difference of two renderings of a short fixed conversation, with the new messages and without.
        None means that the response ended otherwise: it was cut, or it ended the whole text. Raises ValueError as
        `check_turns` does.
        """
        if not self._turns_can_follow:
            self.check_turns()
        if response_ids[-1] != self.end_of_turn:
            return None
        new = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if tools and new[0].get("role") == "tool":
            after = self._after_tools(new, tools)
        else:
            _, _, after = self._render([*TURN, *new], generation_prompt=True, tools=tools).partition(ANSWER)
        return tuple(self._tokenizer.encode(after.lstrip(), add_special_tokens=False)[1:])

    def _after_tools(self, new: Sequence[Message], tools: Tools) -> str:
        """Return the text from the end of a turn that called tools to the next one.

        Raises ValueError when the template writes the calls otherwise because of what follows.
        """
        calls = [_call(message, number) for number, message in enumerate(m for m in new if m.get("role") == "tool")]
        turn = [TURN[0], {"role": "assistant", "content": ANSWER, "tool_calls": calls}]
        # only what follows the answer matters: what was sampled before it stays, thoughts included
        _, _, before = self._render(turn, generation_prompt=False, tools=tools).partition(ANSWER)
        _, _, whole = self._render([*turn, *new], generation_prompt=True, tools=tools).partition(ANSWER)
        if not before or not whole.startswith(before):
            raise ValueError(
                f"the chat template writes {before!r} for a turn's tool calls, but {whole!r} once a tool has answered: "
                "conversations with tools cannot be continued with it; take a template that writes past turns as they "
                "were"
            )
        _, _, closing = self._render(TURN, generation_prompt=False, tools=tools).partition(ANSWER)
        return closing + whole[len(before) :]

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool, tools: Tools = None) -> str:
        options = self._options | ({"tools": list(tools)} if tools else {})
        return self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=generation_prompt, tokenize=False, **options
        )


def _call(message: Message, number: int) -> dict[str, Any]:
    """A tool call that the message of a tool may answer."""
    function = {"name": str(message.get("name", QUESTION)), "arguments": {}}
    return {"id": str(message.get("tool_call_id", f"call{number:05d}")), "type": "function", "function": function}
