"""The tokenizer of a model folder, read from local files only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
)
"""A folder with none of these holds no tokenizer that could be loaded."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self, conversation: Sequence[Any], *, add_generation_prompt: bool, tokenize: bool
    ) -> str: ...


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder without touching the network.

    ValueError if the folder or its tokenizer files are missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"model.path = {folder} is not a folder; give a local Hugging Face folder (nothing is downloaded)"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model.path = {folder} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the "
            f"model's tokenizer files into it"
        )
    from transformers import (
        AutoTokenizer,
    )  # slow to import, and tests with a tokenizer of their own need it not

    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # transformers raises many types; each means that these files cannot be used
        raise ValueError(f"cannot load the tokenizer of model.path = {folder}: {error}") from error


def stop_token_ids(folder: Path | str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids at which a response ends: `eos_token_id` of the tokenizer and of generation_config.json, ascending.

    ValueError if there is none: every response would run into the length limit.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    path = Path(folder) / "generation_config.json"
    if path.is_file():
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
    if not ids:
        raise ValueError(
            f"the tokenizer of {folder} has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    return tuple(sorted(ids))


def response_text(tokenizer: Tokenizer, token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Text of a response for the verifier: a final stop token and all special tokens are left out."""
    ids = list(token_ids)
    if ids and ids[-1] in stop_ids:
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=True)
