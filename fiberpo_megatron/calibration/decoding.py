"""This module times a real SGLang engine: steady decoding by the number of running requests, prefill, requests, calls.

Every figure is a difference of two timings, so that what they have in common (the network, the first token) drops out.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from fiberpo_megatron.calibration.timing import ROUNDS
from fiberpo_megatron.engines.client import EngineClient, Sampling
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import engines
from fiberpo_megatron.engines.settings import EngineConfig

RUNNING = (1, 16, 64, 256, 1024)
"""Numbers of requests that are decoded together, as far as the engine's settings and its cache allow."""
LEAST_TOKENS = 8
"""Tokens of a response that are enough to see steady decoding."""
TIMEOUT_S = 300.0


class FixedLength(Sampling):
    """This makes responses of exactly `max_response_tokens` tokens: the model's end token does not end them."""

    def as_json(self, seed: int | None = None) -> dict[str, object]:
        return {**super().as_json(seed), "ignore_eos": True}


@dataclass(frozen=True)
class Generation:
    """Holds the seconds of generations, one number per round, after which every response was there."""

    responses: int
    """Responses that were asked for at once."""
    prompt: int
    """Tokens of each prompt."""
    tokens: int
    """Tokens of each response."""
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EngineTimes:
    """Holds everything that was timed on one engine."""

    generations: list[Generation]
    call: list[float]
    """Seconds of one control call that does nothing on the engine."""


async def _generate(client: EngineClient, work: Generation, samples: int, vocabulary: int, seed: int) -> float:
    """Return the seconds of `work`, in requests of `samples` responses to one prompt as a run sends them; long prompts
    are all different, because an engine may read equal ones once."""
    samples = samples if work.prompt <= 8 else 1
    random = np.random.default_rng(seed)
    prompts = random.integers(2, vocabulary, (-(-work.responses // samples), work.prompt)).tolist()
    sampling = FixedLength(work.tokens)
    counts = [min(samples, work.responses - start) for start in range(0, work.responses, samples)]
    began = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for prompt, count in zip(prompts, counts):
            seeds = [int(number) for number in random.integers(0, 2**31, count)]
            tasks.create_task(client.generate([prompt] * count, sampling, seeds=seeds, vocabulary=vocabulary))
    return perf_counter() - began


def plan_generations(running: int, cache: int, longest: int) -> list[Generation]:
    """Return what to time on an engine of `running` requests, `cache` tokens and a longest text of `longest` tokens."""
    prompt = max(8, min(1024, longest // 2))
    found = []
    for count in [number for number in RUNNING if number < running] + [running]:
        many = min(24, longest // 4, cache // count - 16)
        if many >= LEAST_TOKENS:
            found += [Generation(count, 8, 2), Generation(count, 8, many)]
    several = max(1, min(8, running, cache // (prompt + 16)))
    return [*found, Generation(several, prompt, 2), Generation(several, 8, 2)]


def time_engine(
    config: EngineConfig,
    model: Path,
    folder: Path,
    *,
    dtype: str,
    samples: int,
    vocabulary: int,
    cache: int,
    longest: int,
) -> EngineTimes:
    """Start an engine with these settings and time it; it is stopped at the end.

    Args:
        config, model, folder, dtype: as `engines.servers.engines` takes them.
        samples: responses to one prompt in a request, as a run sends them.
        vocabulary: prompts are made of token ids below it.
        cache: tokens of KV cache, which bound how many responses are asked for at once.
        longest: tokens of the longest text that the model takes.

    Raises EngineError when the engine does not start or answer.
    """
    works = plan_generations(config.max_running_requests, cache, longest)
    calls = []
    with (
        engines(config, model, folder, dtype=dtype) as addresses,
        EnginePool(addresses[:1], timeout_s=TIMEOUT_S, max_concurrent=config.max_running_requests) as pool,
    ):
        client = pool.clients[0]
        for number in range(ROUNDS + 1):
            for work in works:
                seconds = pool.run(_generate(client, work, samples, vocabulary, number))
                if number:  # the first round compiles and fills caches
                    work.seconds.append(seconds)
        for _ in range(20):
            began = perf_counter()
            pool.run(client.model_info())
            calls.append(perf_counter() - began)
    return EngineTimes(works, calls)
