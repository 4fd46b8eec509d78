"""This module reads the tokenizer of a model folder, from local files only."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from fiberpo_megatron.json_files import read_object
from fiberpo_megatron.printable import printable

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
    """Declares the part of a Hugging Face tokenizer that this package uses."""

    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self, conversation: Sequence[Any], *, add_generation_prompt: bool, tokenize: bool, **options: Any
    ) -> str: ...


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder without network access and without running code from the folder.

    Raises ValueError if the folder or its tokenizer files are missing or broken, or if the tokenizer exists only as
    code in the folder (`auto_map`).
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
    )  # it is slow to import, and tests with another tokenizer do not need it

    try:
        # Without `trust_remote_code` transformers asks at the terminal whether to run the folder's code.
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return cast(Tokenizer, found)
    except Exception as error:  # transformers raises many types; each means that these files cannot be used
        text = printable(str(error), keep="\n")
        raise ValueError(f"cannot load the tokenizer of model.path = {folder}: {text}") from error


def stop_token_ids(folder: Path | str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids at which a response ends, ascending.

    They are `eos_token_id` of the tokenizer, of config.json and of generation_config.json (SGLang always stops at those
    of the two files). Raises ValueError if there is none (every response would run into the length limit), or for a
    file that is damaged.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for path in (Path(folder) / "config.json", Path(folder) / "generation_config.json"):
        if path.is_file():
            ids.update(_listed_ends(path))
    if not ids:
        raise ValueError(
            f"the tokenizer of {folder} has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    return tuple(sorted(ids))


def _listed_ends(path: Path) -> list[int]:
    """Return `eos_token_id` of a file as a list; the file may hold a number, a list or nothing."""
    try:
        listed = read_object(path).get("eos_token_id")
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object ({error}); download it again") from error
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        shown = printable(repr(listed))[:200]
        raise ValueError(f"{path}: eos_token_id = {shown}; it must be token ids (whole numbers below 2^31)")
    return ids


def tokens_with(tokenizer: Tokenizer, characters: Collection[str], vocabulary: int) -> tuple[int, ...]:
    """Return the ids below `vocabulary` whose text contains one of `characters`, ascending.

    Raises ValueError for a character that no token has, because no response would end with it.
    """
    if not characters:
        return ()
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(vocabulary)]
    for character in characters:
        if not any(character in text for text in texts):
            raise ValueError(f"rollout.stop: no token of the tokenizer contains {character!r}; take it out of the list")
    return tuple(i for i, text in enumerate(texts) if any(character in text for character in characters))


def response_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    stop_ids: Collection[int],
    stop: Collection[str] = (),
    special: bool = False,
) -> str:
    """Return the text of a response for the verifier.

    A final stop token, all special tokens unless `special` is true, and everything from the first character of `stop`
    on are left out.
    """
    ids = list(token_ids)
    if ids and ids[-1] in stop_ids:
        ids.pop()
    text = tokenizer.decode(ids, skip_special_tokens=not special)
    return text[: min((at for character in stop if (at := text.find(character)) >= 0), default=len(text))]
