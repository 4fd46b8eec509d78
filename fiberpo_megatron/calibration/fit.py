"""This module turns timings into the planner's constants: those with which its own model gives the measured seconds.

Every constant is fitted to the medians of the rounds, and once more to each round alone: the quartiles of those are its
spread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from fiberpo_megatron.calibration.decoding import EngineTimes
from fiberpo_megatron.calibration.links import LinkTimes
from fiberpo_megatron.calibration.passes import LAYERS, shortened
from fiberpo_megatron.calibration.products import best
from fiberpo_megatron.calibration.ranks import RankTimes
from fiberpo_megatron.config import Config
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.planning.calibration import Constant
from fiberpo_megatron.planning.decoding import make_decoder
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.lengths import Lengths
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.shapes import shape_of
from fiberpo_megatron.planning.states import DTYPE_BYTES
from fiberpo_megatron.planning.training import optimizer_seconds, row_time

SHARES = ("matmul_efficiency", "expert_matmul_efficiency", "attention_efficiency", "memory_efficiency")
"""The trainer's shares of the device's speed. Whole passes are timed, so that all of them move by one factor."""
LEAST_US = 1e-6
"""What a floor is set to that a constant cost takes the place of."""
Fitted = dict[str, float]


def nonnegative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the x >= 0 with the least squared relative error of `rows` x against `seconds`.

    There are few unknowns, so that every choice of those that are 0 is tried.
    """
    right = np.asarray(seconds, float)
    matrix = np.asarray(rows, float) / right[:, None]
    unknowns = matrix.shape[1]
    found, least = np.zeros(unknowns), float(len(right))
    for count in range(1, unknowns + 1):
        for chosen in combinations(range(unknowns), count):
            part, *_ = np.linalg.lstsq(matrix[:, chosen], np.ones(len(right)), rcond=None)
            error = float(((matrix[:, chosen] @ part - 1) ** 2).sum())
            if (part >= 0).all() and error < least - 1e-12:
                found, least = np.zeros(unknowns), error
                found[list(chosen)] = part
    return [float(value) for value in found]


def constants_of(
    fit: Callable[[Callable[[Sequence[float]], float]], Fitted], rounds: int, units: Mapping[str, str]
) -> dict[str, Constant]:
    """Return the constants of `fit`, which gets a function that picks one number of each timing's rounds."""
    value = fit(median)
    each = [fit(lambda numbers, at=number: numbers[at]) for number in range(rounds)]  # type: ignore[misc]
    found = {}
    for name, middle in value.items():
        low, high = np.percentile([one[name] for one in each], [25, 75])
        found[name] = Constant(
            middle, min(float(low), middle), max(float(high), middle), units.get(name, unit_of(name))
        )
    return found


def unit_of(name: str) -> str:
    """Return the unit of a constant by its name."""
    endings = {"_tflops": "10^12 operations/s", "_gb_per_s": "10^9 bytes/s", "_gb": "10^9 bytes", "_us": "us"}
    endings |= {"_ms": "ms", "_s": "s", "_efficiency": "share"}
    return next(unit for ending, unit in endings.items() if name.endswith(ending))


def device_constants(times: RankTimes, memory_gb: float) -> dict[str, Constant]:
    """Return the speed of the device, and of the links among the ranks."""
    rounds = len(times.copies)
    found = {"device.memory_gb": Constant(memory_gb, memory_gb, memory_gb, unit_of("_gb"))}

    def fit(pick: Callable[[Sequence[float]], float]) -> Fitted:
        values = {f"device.{dtype}_tflops": pick(best(times.products, dtype)) for dtype in ("float32", "bfloat16")}
        return {**values, "device.memory_gb_per_s": pick(times.copies), **_links(times, pick)}

    return {**found, **constants_of(fit, rounds, {})}


def _links(times: RankTimes, pick: Callable[[Sequence[float]], float]) -> Fitted:
    """Return bandwidth and latency: the slowest operation's rate at the largest size, and the time of a small
    all-reduce."""
    if not times.links:
        return {}
    largest: dict[str, LinkTimes] = {}
    for link in times.links:
        if link.operation not in largest or link.bytes > largest[link.operation].bytes:
            largest[link.operation] = link
    rate = min(link.bytes / pick(link.seconds) / 1e9 for link in largest.values())
    small = min((link for link in times.links if link.operation == "all_reduce"), key=lambda link: link.bytes)
    latency = pick(small.seconds) * 1e6
    if times.one_machine:
        name, kind = "device.link_gb_per_s", "nvlink"
    else:
        name, kind = "device.network_gb_per_s", "network"
    # the rate is what collectives reach, so that the share of it is whole
    return {name: rate, f"assumptions.{kind}_efficiency": 1.0, f"assumptions.{kind}_latency_us": latency}


def probe_scenario(
    config: Config, hf_config: Mapping[str, Any], gpu: Gpu, ranks: int, length: int, tokens: int
) -> Scenario:
    """Return a scenario with the layout of the ranks and one row of sequences of `length` tokens."""
    engine = config.rollout.engine
    return Scenario(
        shape=shape_of(read_architecture(hf_config)),
        gpu=gpu,
        trainer_gpus=ranks,
        engine_gpus=engine.tensor,
        colocated=False,
        parallel=config.parallel,
        engine_tensor=engine.tensor,
        prompts=1,
        samples=1,
        optimiser_steps=1,
        lengths=Lengths(0.0, float(length), float(length), 0.0),
        row_tokens=tokens,
        recompute=False,
        width=DTYPE_BYTES[config.model.dtype],
        engine_width=DTYPE_BYTES[config.model.dtype if engine.dtype == "auto" else engine.dtype],
        graph_limit=0 if "--disable-cuda-graph" in engine.extra_args else None,
    )


def trainer_constants(
    times: RankTimes, config: Config, hf_config: Mapping[str, Any], gpu: Gpu, assumptions: Assumptions
) -> dict[str, Constant]:
    """Return the trainer's shares of the device's speed, and what its passes, its optimizer and its saves cost
    beside."""
    base = replace(assumptions, train_kernel_us=LEAST_US)
    rows, fixed = [], []
    for item in times.passes:
        scenario = probe_scenario(config, shortened(hf_config, item.layers), gpu, times.ranks, item.length, item.tokens)
        row = row_time(scenario, scenario.shape, item.tokens, base)
        work = row.forward - row.collectives
        rows += [[1, item.layers, 0, 0, work], [1, item.layers, 1, item.layers, work + row.backward - row.collectives]]
        fixed += [row.collectives, 2 * row.collectives]

    def fit(pick: Callable[[Sequence[float]], float]) -> Fitted:
        seconds = [value for item in times.passes for value in (pick(item.forward), pick(item.train))]
        rest = [max(value / 10, value - part) for value, part in zip(seconds, fixed)]
        one, layer, backward, backward_layer, factor = nonnegative(rows, rest)
        shares = {f"assumptions.{name}": min(1.0, getattr(base, name) / max(factor, 1e-6)) for name in SHARES}
        found = {
            **shares,
            "assumptions.train_kernel_us": LEAST_US,
            "assumptions.pass_s": one,
            "assumptions.layer_s": layer,
            "assumptions.backward_pass_s": backward,
            "assumptions.backward_layer_s": backward_layer,
        }
        after = replace(base, **{name.partition(".")[2]: value for name, value in shares.items()})
        for name, what in (("optimizer", "optimizer"), ("publish", "export"), ("checkpoint", "save")):
            known = {model.layers: pick(getattr(model, what)) for model in times.models}
            if name == "optimizer":
                for layers in known:
                    scenario = probe_scenario(config, shortened(hf_config, layers), gpu, times.ranks, 1, 1)
                    known[layers] = max(0.0, known[layers] - optimizer_seconds(scenario, after))
            few, many = LAYERS
            each = max(0.0, (known[many] - known[few]) / (many - few))
            found |= {f"assumptions.{name}_layer_s": each, f"assumptions.{name}_s": max(0.0, known[few] - few * each)}
        return found

    return constants_of(fit, len(times.copies), {})


def engine_constants(
    times: EngineTimes,
    score: Sequence[float],
    config: Config,
    hf_config: Mapping[str, Any],
    gpu: Gpu,
    assumptions: Assumptions,
) -> dict[str, Constant]:
    """Return the engine's constants: those of a decoding step, of reading prompts, and of a response beside its tokens.

    `score` are the seconds in which an environment scores a response, which pass during generation.
    """
    slow = replace(assumptions, engine_step_ms=0.0, engine_request_us=0.0, decode_kernel_us=LEAST_US)
    scenario = probe_scenario(config, hf_config, gpu, 1, 1, 1)
    decoder = make_decoder(scenario, slow)
    rows, known = [], []
    for work in times.generations:
        cached = work.responses * (work.prompt + work.tokens / 2)
        known.append(work.tokens * decoder.step(work.responses, cached))
        reading = work.responses * work.prompt * decoder.prompt_token
        rows.append([1.0, work.responses, work.tokens, work.tokens * work.responses, reading])

    def fit(pick: Callable[[Sequence[float]], float]) -> Fitted:
        seconds = [pick(work.seconds) for work in times.generations]
        # what the device's speed explains may not exceed what was measured: then the share of its bandwidth is larger
        factor = min(1.0, *(value / part for value, part in zip(seconds, known)))
        rest = [max(value / 10, value - factor * part) for value, part in zip(seconds, known)]
        generation, response, step, request, reading = nonnegative(rows, rest)
        return {
            "assumptions.decode_memory_efficiency": min(1.0, slow.decode_memory_efficiency / factor),
            "assumptions.expert_memory_efficiency": min(1.0, slow.expert_memory_efficiency / factor),
            "assumptions.decode_kernel_us": LEAST_US,
            "assumptions.engine_step_ms": step * 1e3,
            "assumptions.engine_request_us": request * 1e6,
            "assumptions.prefill_efficiency": min(1.0, slow.prefill_efficiency / max(reading, 1e-3)),
            "assumptions.generate_s": generation,
            "assumptions.response_s": response + (pick(score) if score else 0.0),
        }

    return constants_of(fit, min(len(work.seconds) for work in times.generations), {})


def with_calls(constants: Mapping[str, Constant], call: Sequence[float], calls: int) -> dict[str, Constant]:
    """Return the constants with the control calls of a publication added to its own cost."""
    low, high = np.percentile(call, [25, 75])
    own = constants["assumptions.publish_s"]
    middle = median(call)
    whole = Constant(own.value + calls * middle, own.low + calls * float(low), own.high + calls * float(high), own.unit)
    return {**constants, "assumptions.publish_s": whole}


def measurements(
    times: RankTimes, engine: EngineTimes | None, scores: Sequence[float], trajectory: Sequence[float]
) -> dict[str, Constant]:
    """Return every timing with its spread, for people to look at."""
    found = {name: spread(values, unit) for name, values, unit in _named(times, engine)}
    if scores:
        found["score of a response"] = spread(scores, "s")
    return found | {"a trajectory in a batch": spread(trajectory, "s")}


def _named(times: RankTimes, engine: EngineTimes | None) -> Iterator[tuple[str, Sequence[float], str]]:
    for name, rates in times.products.items():
        yield f"product {name}", rates, "10^12 operations/s"
    yield "memory copy", times.copies, "10^9 bytes/s"
    for link in times.links:
        yield f"{link.operation} of {link.bytes} bytes", link.seconds, "s"
    for item in times.passes:
        yield f"forward of {item.layers} layers, {item.tokens} tokens", item.forward, "s"
        yield f"forward and backward of {item.layers} layers, {item.tokens} tokens", item.train, "s"
    for model in times.models:
        yield f"optimizer step of {model.layers} layers", model.optimizer, "s"
        yield f"export of {model.layers} layers", model.export, "s"
        yield f"checkpoint of {model.layers} layers", model.save, "s"
    if engine is not None:
        for work in engine.generations:
            name = f"{work.responses} responses of {work.tokens} tokens to prompts of {work.prompt}"
            yield name, work.seconds, "s"
        yield "control call of an engine", engine.call, "s"


def spread(values: Sequence[float], unit: str) -> Constant:
    """Return the median and the quartiles of the rounds."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return Constant(float(middle), float(low), float(high), unit)
