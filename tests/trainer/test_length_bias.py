"""Sampling ahead prefers no short response: on a virtual clock long ones come late, and are trained on all the same."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from fiberpo_megatron.interfaces import SamplingChange
from fiberpo_megatron.simulation.clock import VirtualLoop
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.types import Completion
from tests.trainer.test_supply import PROMPTS, SAMPLES, STEPS, Timed, ahead

TOKEN_S, STEP_S, LONGEST = 0.1, 1.0, 60


class HeavyTailed(Timed):
    """A few of its responses are much longer than the others. It notes the length of each that it is asked for."""

    def __init__(self) -> None:
        super().__init__(timing=0)
        self.admitted: list[int] = []

    async def sample(self, prompt: Sequence[int], seeds: Sequence[int], **limits: object) -> list[Completion]:
        (seed,) = seeds
        length = min(LONGEST, 1 + int(3 * np.random.default_rng(seed).pareto(1.2)))
        self.admitted.append(length)
        await asyncio.sleep(length * TOKEN_S)
        self.random.manual_seed(seed)
        return [self._one(prompt[-1], SamplingChange(max_response_tokens=length))]


class Trained(NamedTuple):
    admitted: list[int]
    """Lengths of the responses that were asked for."""
    lengths: list[list[int]]
    """Those of the responses that each step was trained on."""
    logged: list[float]
    """`response_length/mean` of each step."""
    seconds: float


@cache
def trained(staleness: int) -> Trained:
    engine, loop = HeavyTailed(), VirtualLoop(0.0, lambda: None)
    run, memory, taken = ahead(staleness, engine, drain=False)
    source, step = run.source, run.policy.step
    assert isinstance(source, EngineSource) and source.generator is not None
    source.generator = replace(source.generator, loop=loop)

    def slow_step(*arguments: Any, **named: Any) -> Any:
        loop.sleep(STEP_S)
        return step(*arguments, **named)

    run.policy.step = slow_step  # type: ignore[method-assign]
    train(replace(run, max_response_tokens=LONGEST))
    lengths = [batch.response_lengths.tolist() for batch in taken]
    return Trained(engine.admitted, lengths, memory.values("train", "response_length/mean"), loop.time())


@pytest.mark.parametrize("staleness", range(5))
def test_the_trained_lengths_are_the_admitted_ones(staleness: int):
    """Their mean over that of what was admitted is 1, and each step has the lengths that it has without staleness."""
    found = trained(staleness)
    assert sorted(length for of_step in found.lengths for length in of_step) == sorted(found.admitted)
    assert len(found.admitted) == STEPS * PROMPTS * SAMPLES
    assert found.lengths == trained(0).lengths
    assert found.logged == pytest.approx([np.mean(of_step) for of_step in found.lengths])
    assert np.mean(found.admitted) > 1.5 * np.median(found.admitted), "there is something to prefer"


def test_what_waits_for_no_long_response_is_done_earlier():
    synchronous = sum(TOKEN_S * max(lengths) for lengths in trained(0).lengths)
    training = STEPS * 2 * STEP_S
    seconds = [trained(staleness).seconds for staleness in range(5)]
    assert seconds[0] == pytest.approx(synchronous + training)
    assert seconds == sorted(seconds, reverse=True) and seconds[1] < 0.8 * seconds[0]
    assert seconds[-1] >= training
