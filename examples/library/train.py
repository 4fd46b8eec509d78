"""Train from Python, without the command line, with a reward and an objective of your own.

    torchrun --nproc-per-node 2 examples/library/train.py runs/demo/warmup/hf runs/library --trainer.steps 20

The model must speak the demo's language: `fiberpo sft examples/demo/warmup.toml` writes one.
"""

import sys
from dataclasses import dataclass

import torch

from fiberpo_megatron import Run, load_config
from fiberpo_megatron.environments import Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.fibration import Chunk, GatedChunk, TokenObjective


class Sums(SingleTurn):
    """Asks for sums of two digits and rewards every digit that is right."""

    train_size, held_out_size = 9000, 1000

    def __init__(self, partial: float = 0.5) -> None:
        self.partial = partial

    def train(self, index: int) -> Task:
        return self._task(index)

    def held_out(self, index: int) -> Task:
        return self._task(self.train_size + index)

    def _task(self, number: int) -> Task:
        first, second = divmod(number * 7919 % 10_000, 100)  # 7919 is prime: each number once, in mixed order
        return Task(f"{first:02d}+{second:02d}=", f"{first + second:03d}", {"operands": [first, second]})

    def score(self, task: Task, turn: Turn) -> Outcome:
        said = turn.text.strip()
        digits = sum(a == b for a, b in zip(said, task.answer)) / len(task.answer)
        exact = float(said == task.answer)
        return Outcome(max(exact, self.partial * digits), {"digits": digits, "exact": exact}, correct=exact == 1.0)


@dataclass(frozen=True)
class SoftClip(TokenObjective):
    """Bounds the ratio smoothly: G = 1 + width tanh((r - 1) / width), instead of PPO's hard clip."""

    width: float = 0.2

    def gate(self, chunk: Chunk) -> GatedChunk:
        bend = torch.tanh((chunk.ratio - 1.0) / self.width)
        slope = (1.0 - bend**2) * chunk.ratio  # dG/dx with r = exp(x)
        return GatedChunk(1.0 + self.width * bend, chunk.weights * chunk.advantages * slope)


def main(model: str, folder: str, *overrides: str) -> None:
    """Train `model` on sums; the run goes to `folder`."""
    config = load_config("examples/demo/train.toml", ["--model.path", model, "--run.folder", folder, *overrides])
    with Run.from_config(config, environments={"sums": Sums(partial=0.3)}, objective=SoftClip(width=0.1)) as run:
        run.train()
        run.say(f"held out: {run.evaluate()}")


if __name__ == "__main__":  # the environment's workers import this file
    main(*sys.argv[1:])
