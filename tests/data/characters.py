"""A character tokenizer without files, for tests of prompt sets."""

from collections.abc import Sequence
from typing import Any


class CharacterTokenizer:
    """One token per character (its code point + 10); 1 is the end of a sequence, 2 begins one."""

    eos_token_id: int | None = 1

    def __init__(self, chat: bool = False) -> None:
        self.chat_template = "template" if chat else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [2] * add_special_tokens + [ord(character) + 10 for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(i - 10) if i >= 10 else "" if skip_special_tokens else f"<{i}>" for i in token_ids)

    def apply_chat_template(
        self, conversation: Sequence[Any], *, add_generation_prompt: bool, tokenize: bool, **options: Any
    ) -> str:
        assert add_generation_prompt and not tokenize and not options
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation) + "<assistant>"
