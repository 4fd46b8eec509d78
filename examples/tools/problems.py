"""This module holds the products of the tool example, and how the warm-up writes conversations about them.

    python -m examples.tools.problems FOLDER

It writes train.jsonl and held_out.jsonl, with one question and its answer a line, for the environments of the run.
"""

import json
import sys
from pathlib import Path

from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.environments.shuffle import Permutation, derive_key

HELD_OUT, TRAIN = 512, 8000
"""Number of questions in the two files."""
PRODUCTS = 90 * 900
"""Number of products of a number with two digits and one with three."""
ORDER = Permutation(PRODUCTS, derive_key("products"))


def problem(place: int) -> tuple[str, str]:
    """Return question and answer at `place` of the fixed order of all products; the first ones are held out."""
    first, second = divmod(ORDER(place), 900)
    return f"{first + 10}*{second + 100}=", str((first + 10) * (second + 100))


class Habits(SingleTurn):
    """Shows the warm-up how conversations about products go on. Four kinds take turns, each as often as the others.

    Where the calculator is offered, the model calls it or answers at once; after a result it answers with the result;
    where nothing is offered it answers at once. Prompts are raw text, as the model's chat template writes them, since
    a supervised example has one answer and no tools.
    """

    train_size = PRODUCTS - HELD_OUT
    held_out_size = 0

    def train(self, index: int) -> Task:
        question, answer = problem(HELD_OUT + index)
        asked = f"u:{question}<eos>a:"
        call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "' + question[:-1] + '"}}\n</tool_call>'
        kinds = (
            (f"t:calculator\n{asked}", call),
            (f"t:calculator\n{asked}", answer),
            (f"t:calculator\n{asked}{call}<eos>r:{answer}<eos>a:", answer),
            (asked, answer),
        )
        return Task(*kinds[index % len(kinds)])

    def score(self, task: Task, turn: Turn) -> Outcome:
        return Outcome(float(turn.text == task.answer))


def write_files(folder: Path) -> None:
    """Write train.jsonl and held_out.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, places in (("held_out", range(HELD_OUT)), ("train", range(HELD_OUT, HELD_OUT + TRAIN))):
        lines = []
        for question, answer in map(problem, places):
            message = {"role": "user", "content": question}
            lines.append(json.dumps({"prompt": [message], "answer": answer}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
