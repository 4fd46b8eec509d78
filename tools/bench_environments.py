"""Measure how many trivial scores and turns a second a pool of workers handles.

    python tools/bench_environments.py --workers 2

It prints the scores of a SingleTurn environment per second and the turns of a conversation per second, with a policy
that answers at once. Both are limited by the processors that the workers and the trainer share. On two cores that
other programs used as well (load 9 to 14) it printed 1,618, 2,421 and 3,062 scores/s in three runs that followed each
other; a score took 156 microseconds of processor time in the trainer and 122 in the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the workers import this file

from fiberpo_megatron.environments import Environment, Outcome, SingleTurn, Task, Turn
from fiberpo_megatron.environments.host import EnvironmentPool, Failure
from fiberpo_megatron.environments.jobs import Say
from fiberpo_megatron.environments.settings import EnvironmentConfig

TURNS = 4


class Trivial(SingleTurn):
    """Compares a text with the answer."""

    train_size = 1

    def train(self, index: int) -> Task:
        return Task(prompt="1+1=", answer="2")

    def score(self, task: Task, turn: Turn) -> float:
        return float(turn.text == task.answer)


class Talk(Environment):
    """Says something `TURNS` times."""

    train_size = 1

    def train(self, index: int) -> Task:
        return Task(prompt="1+1=", answer="2")

    async def run(self, task: Task, policy) -> Outcome:  # type: ignore[no-untyped-def]
        for _ in range(TURNS):
            turn = await policy.say("again")
        return Outcome(float(turn.text == task.answer))


async def bench(name: str, count: int, workers: int, tokens: int) -> float:
    """Return how many calls of environment `name` a pool finishes per second."""
    use = f"bench_environments:{name}"
    pool = EnvironmentPool(EnvironmentConfig(name="bench", use=use, workers=workers), folder=None)
    turn = Turn("2", token_ids=tuple(range(10_000, 10_000 + tokens)))

    async def say(new: object, tools: object, max_tokens: object, stop: object) -> Turn:
        return turn

    def converse() -> Say:
        return say

    try:
        description = await pool.start()
        task = (await pool.tasks("train", [0]))[0]

        async def call(seed: int) -> None:
            if description.single_turn:
                outcome = await pool.score(task, turn, seed=seed)
            else:
                outcome = await pool.run(task, converse, seed=seed)
            if isinstance(outcome, Failure) or outcome.reward != 1.0:
                raise RuntimeError(f"the environment answered {outcome}")

        await asyncio.gather(*map(call, range(count // 10)))
        began = perf_counter()
        await asyncio.gather(*map(call, range(count)))
        return count / (perf_counter() - began)
    finally:
        await pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--count", type=int, default=10_000, help="calls to measure")
    parser.add_argument("--tokens", type=int, default=100, help="token ids in each turn of the policy")
    options = parser.parse_args()
    scores = asyncio.run(bench("Trivial", options.count, options.workers, options.tokens))
    print(f"score: {scores:,.0f} scores/s ({options.workers} workers, {options.tokens} tokens a turn)")
    runs = asyncio.run(bench("Talk", options.count // 5, options.workers, options.tokens))
    print(f"run:   {runs * TURNS:,.0f} turns/s in conversations of {TURNS} turns")


if __name__ == "__main__":
    main()
