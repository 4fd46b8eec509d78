"""This stands between tasks and tokens: prompts, supervised examples, the next turn, the text of a response.

Text that becomes tokens must be valid Unicode: a lone surrogate in it is refused, with the environment and the task.
Text that is only recorded (answers, metadata, messages of failures) may hold anything: files and pages show such
characters as escapes (`printable.py`).
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fiberpo_megatron.data.chat import ChatTemplate, Message, Tools
from fiberpo_megatron.data.prompts import Place
from fiberpo_megatron.data.tokenizer import Tokenizer, response_text, stop_token_ids, tokens_with
from fiberpo_megatron.environments import Task
from fiberpo_megatron.types import Prompt


@dataclass(frozen=True)
class Example:
    """It is a prompt with its right answer, for supervised warm-up."""

    prompt: Prompt
    target_ids: tuple[int, ...]
    """Tokens of the answer, then the one that ends it: the chat template's end of turn, or the end of the sequence."""


_SOME_TOOLS: Tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
"""Tools with which the chat template is checked before a run."""
LONGEST_CHARACTER = 4
"""Tokens in which one character may be cut: a byte each."""
MOST_PIECES = 1 << 17
"""Texts of tokens that are remembered: more than any vocabulary has in use."""


class PromptTooLong(ValueError):
    """A prompt has more tokens than data.max_prompt_tokens."""


class Encoder:
    """This encoder turns tasks into tokens and responses into text, with one chat template for each environment.

    `chat_options`: variables of the chat template by environment. `stop`: `rollout.stop`. `vocabulary`: number of token
    ids of the model. `model`: the folder whose files name the tokens that end a text. `tools`: conversations may pass
    tools, so that the template is checked with them. `skip_long_prompts`: another training task takes the place of one
    whose prompt is longer than `max_prompt_tokens`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        names: Sequence[str],
        chat_options: Sequence[Mapping[str, Any]],
        *,
        model: Path,
        vocabulary: int,
        max_prompt_tokens: int,
        stop: Sequence[str] = (),
        tools: bool = False,
        skip_long_prompts: bool = False,
    ) -> None:
        self.tokenizer, self.names, self.vocabulary = tokenizer, tuple(names), vocabulary
        self._model, self._max_prompt_tokens, self._stop = model, max_prompt_tokens, tuple(stop)
        self._tools = tools
        self.skip_long_prompts = skip_long_prompts
        self._chats = [
            ChatTemplate(tokenizer, options) if tokenizer.chat_template else None for options in chat_options
        ]
        self._tokens_with: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[int, ...], str] = {}
        self.uses_chat = [False] * len(self.names)
        """By environment: whether a chat template wrote one of its prompts so far."""

    def prompt(self, place: Place, task: Task) -> Prompt:
        """Return the task with its tokens.

        ValueError names environment and task, with file and line if known; PromptTooLong where the prompt is too long.
        """
        self.uses_chat[place.domain] |= not isinstance(task.prompt, str)
        ids, text = self._encode(place.domain, task, task.prompt)
        return Prompt(place.index, place.domain, ids, text, task, place.split)

    def example(self, prompt: Prompt) -> Example:
        """Return the prompt with its right answer, ended as the model is to end it."""
        answer = prompt.task.answer
        if not isinstance(answer, str):
            raise ValueError(
                f"{self._source(prompt.domain, prompt.task)}: the answer is {answer!r}; supervised training needs a "
                "string as Task.answer"
            )
        chat = self._chats[prompt.domain]
        end = chat.end_of_turn if chat and not isinstance(prompt.task.prompt, str) else None
        end = self.tokenizer.eos_token_id if end is None else end
        if end is None:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
        _check_whole(answer, self._source(prompt.domain, prompt.task), "the answer")
        return Example(prompt, (*self.tokenizer.encode(answer, add_special_tokens=False), end))

    def first(self, prompt: Prompt, new: str | Sequence[Message], tools: Tools) -> tuple[int, ...]:
        """Return the tokens with which a conversation begins, when its first words are `new`."""
        if not tools and _same(new, prompt.task.prompt):
            return prompt.token_ids
        return self._encode(prompt.domain, prompt.task, new, tools)[0]

    def following(
        self, prompt: Prompt, response_ids: Sequence[int], new: str | Sequence[Message], tools: Tools
    ) -> tuple[int, ...]:
        """Return the tokens between the response so far and the policy's next turn.

        A string is appended as it is; messages are written by the chat template. ValueError when they cannot follow.
        """
        source = self._source(prompt.domain, prompt.task)
        if isinstance(new, str):
            _check_whole(new, source, "what is said")
            return tuple(self.tokenizer.encode(new, add_special_tokens=False))
        for message in new:
            for text in message.values():
                _check_whole(str(text), source, "what is said")
        chat = self._chat(prompt.domain, source)
        try:
            tokens = chat.continuation(response_ids, new, tools)
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise ValueError(f"{source}: the chat template refuses the messages {new!r:.200}: {error}") from error
        if tokens is None:
            raise ValueError(
                "the policy did not end its turn (it was cut, or ended the whole text), so that no message can follow; "
                'end the conversation when turn.finish_reason is not "stop"'
            )
        return tokens

    def check_conversations(self, domain: int) -> None:
        """Raise ValueError, naming the environment, when its chats cannot be continued token by token.

        Raw text needs no template; messages that follow it are checked when the first is said.
        """
        chat = self._chats[domain]
        if chat is None or not self.uses_chat[domain]:
            return
        try:
            chat.check_turns(_SOME_TOOLS if self._tools else None)
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise ValueError(f"environment {self.names[domain]!r} holds conversations, but {error}") from error

    @property
    def ends_of_turn(self) -> tuple[int, ...]:
        """These tokens end an answer by the chat templates in use."""
        chats = (chat for chat, used in zip(self._chats, self.uses_chat) if chat and used)
        return tuple(sorted({end for chat in chats if (end := chat.end_of_turn) is not None}))

    @cached_property
    def _ends_of_text(self) -> tuple[int, ...]:
        return stop_token_ids(self._model, self.tokenizer)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """These tokens end a response; those with a character of `rollout.stop` are among them."""
        return (*self._ends_of_text, *self.ends_of_turn, *self.tokens_with(self._stop))

    def tokens_with(self, characters: Sequence[str]) -> tuple[int, ...]:
        """Return the ids of all tokens that contain one of these characters."""
        wanted = "".join(sorted(characters))
        if wanted not in self._tokens_with:  # a walk over the vocabulary
            self._tokens_with[wanted] = tokens_with(self.tokenizer, wanted, self.vocabulary)
        return self._tokens_with[wanted]

    def text(self, token_ids: Sequence[int], stop: Sequence[str] = (), special: bool = False) -> str:
        """Return a response's text for the environment, without the token or character that ended it.

        special: keep the text of special tokens, with which many models begin their tool calls.
        """
        ends = (*self._ends_of_text, *self.ends_of_turn)
        return response_text(self.tokenizer, token_ids, stop_ids=ends, stop=(*self._stop, *stop), special=special)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, for people.

        Tokens that hold parts of one character are decoded together, and the first of them has its text.
        """
        found: list[str] = []
        at = 0
        while at < len(token_ids):
            for count in range(1, min(LONGEST_CHARACTER, len(token_ids) - at) + 1):
                text = self._piece(tuple(token_ids[at : at + count]))
                if "\ufffd" not in text:
                    break
            else:  # no character at all
                count, text = 1, self._piece((token_ids[at],))
            found += [text, *[""] * (count - 1)]
            at += count
        return found

    def _piece(self, token_ids: tuple[int, ...]) -> str:
        if token_ids not in self._pieces:
            if len(self._pieces) > MOST_PIECES:
                self._pieces.clear()
            self._pieces[token_ids] = self.tokenizer.decode(token_ids)
        return self._pieces[token_ids]

    def _chat(self, domain: int, source: str) -> ChatTemplate:
        chat = self._chats[domain]
        if chat is None:
            raise ValueError(
                f"{source}: the prompt needs a chat template but the tokenizer has none; write prompts as plain "
                f"strings (a chat environment: set `chat_template = false` in the options of {self.names[domain]!r}), "
                "or add a chat_template to the model's tokenizer_config.json"
            )
        return chat

    def _encode(
        self, domain: int, task: Task, prompt: str | Sequence[Message], tools: Tools = None
    ) -> tuple[tuple[int, ...], str]:
        """Return a prompt's tokens and its text, checked."""
        source = self._source(domain, task)
        if isinstance(prompt, str):
            _check_whole(prompt, source, "the prompt")
            text, ids = prompt, self.tokenizer.encode(prompt, add_special_tokens=True)
            self._check_characters(ids, text, source)
        else:
            chat = self._chat(domain, source)
            try:
                text = chat.prompt(prompt, tools)
            except Exception as error:  # templates are programs of the model's makers and raise what they like
                raise ValueError(f"{source}: the chat template refuses the prompt: {error}") from error
            _check_whole(text, source, "the prompt")
            ids = self.tokenizer.encode(text, add_special_tokens=False)  # the template has written the special tokens
        self._check_length(ids, text, source)
        return tuple(ids), text

    def _check_length(self, ids: Sequence[int], text: str, source: str) -> None:
        if not 1 <= len(ids) <= self._max_prompt_tokens:
            kind = PromptTooLong if ids else ValueError
            raise kind(
                f"{source}: the prompt has {len(ids)} tokens, allowed are 1 to data.max_prompt_tokens = "
                f"{self._max_prompt_tokens}; shorten it or raise the limit: {text[:80]!r}"
            )

    def _check_characters(self, ids: Sequence[int], text: str, source: str) -> None:
        """Raise ValueError when the tokenizer loses characters of a raw prompt: the policy would not see the task."""
        seen = self.tokenizer.decode(ids, skip_special_tokens=True)
        lost = _essential(text) - _essential(seen)
        if lost:  # or the text spells out special tokens, which `seen` leaves out
            words = {self.tokenizer.decode([token]) for token in ids}
            lost -= _essential("".join(word for word in words if word in text))
        if lost:
            raise ValueError(
                f"{source}: the tokenizer turns {text!r} into {seen!r}; use one that has the characters "
                f"{''.join(sorted(lost))!r}"
            )

    def _source(self, domain: int, task: Task) -> str:
        """Return where a task came from, for messages: environment and id, then file and line if known."""
        place = f", {task.metadata['source']}" if "source" in task.metadata else ""
        return f"environment {self.names[domain]!r}, task {task.id}{place}"


def _check_whole(text: str, source: str, what: str) -> None:
    """Raise ValueError for a text with half a character (a lone surrogate): no tokenizer has tokens for it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: {what} holds the lone surrogate {text[error.start]!a} at character {error.start}, half of a "
            "character that was cut; give the whole character, or leave it out"
        ) from None


def _essential(text: str) -> set[str]:
    """Return the characters of a text without what normalising tokenizers change: case, accents, width, white space."""
    return {c for c in unicodedata.normalize("NFKD", text.casefold()) if unicodedata.category(c)[0] not in "CMZ"}


def _same(new: str | Sequence[Message], prompt: str | Sequence[Message]) -> bool:
    if isinstance(new, str) or isinstance(prompt, str):
        return new == prompt
    return [dict(message) for message in new] == [dict(message) for message in prompt]
