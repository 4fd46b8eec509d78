"""Write the model folder of the reasoning-gym example: the demo's tiny Qwen3-MoE with all characters of ASCII.

    python -m examples.reasoning_gym.make_model FOLDER

It writes a config and a tokenizer, no weights. The demo's own vocabulary has no capital letters; tasks of the package
are written with them.
"""

import sys
from pathlib import Path

from examples.demo.make_model import CONFIG, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY, write_files


def write_model(folder: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json into `folder`."""
    characters = map(chr, range(32, 127))
    vocabulary = [*VOCABULARY, *(character for character in characters if character not in VOCABULARY)]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    files = {
        "config": CONFIG | {"vocab_size": len(vocabulary)},
        "tokenizer": TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": numbers}},
        "tokenizer_config": TOKENIZER_CONFIG,
    }
    write_files(folder, files)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))
