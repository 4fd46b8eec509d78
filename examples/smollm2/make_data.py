"""This script writes the problems to train.jsonl and held_out.jsonl: subtraction up to 20 after one solved example.

The prompts are raw text.
"""

import json
import random
from pathlib import Path

LARGEST = 20
SHOWN = (14, 8)
"""The subtraction in every prompt; neither it nor 14 - 6 is among the problems."""


def pairs() -> list[set[tuple[int, int]]]:
    """Return the problems a - b and a - (a - b) in pairs, because they say the same and must stay on one side of the
    split."""
    found = [{(a, b), (a, a - b)} for a in range(LARGEST + 1) for b in range(a // 2 + 1)]
    return [pair for pair in found if SHOWN not in pair]


def record(a: int, b: int) -> dict[str, str]:
    shown, taken = SHOWN
    return {"prompt": f"{shown} - {taken} = {shown - taken}\n{a} - {b} =", "answer": str(a - b)}


def split() -> dict[str, list[dict[str, str]]]:
    """Hold out a quarter of the pairs, drawn with a fixed seed."""
    shuffled = pairs()
    random.Random(0).shuffle(shuffled)
    cut = len(shuffled) // 4
    sides = {"held_out": shuffled[:cut], "train": shuffled[cut:]}
    return {name: [record(a, b) for pair in side for a, b in sorted(pair)] for name, side in sides.items()}


def main() -> None:
    for name, records in split().items():
        lines = "".join(json.dumps(item) + "\n" for item in records)
        (Path(__file__).parent / f"{name}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
