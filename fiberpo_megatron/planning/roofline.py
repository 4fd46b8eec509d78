"""This module says what bounds each phase of a planned step: arithmetic, memory, links, latency or waiting."""

from dataclasses import dataclass, replace
from typing import Any

from fiberpo_megatron.planning.collectives import GIGA
from fiberpo_megatron.planning.decoding import Decoder, make_decoder
from fiberpo_megatron.planning.estimate import Plan
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.rollouts import alone
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.timing import TERA, engine_load
from fiberpo_megatron.planning.training import RowTime, optimizer_state_bytes, packing, passes


@dataclass(frozen=True)
class Bound:
    """This is what a phase of a step spends its time on, on one of its GPUs."""

    phase: str
    seconds: float
    """Of a step."""
    parts: tuple[tuple[str, float], ...]
    """What the time is spent on, in words, and its seconds; the largest first."""
    operations: float
    """Floating-point operations of the phase on one GPU and in one step."""
    memory_bytes: float
    """Bytes that the phase reads and writes in the GPU's memory, in one step."""

    @property
    def limit(self) -> str:
        """Return the words of the largest part."""
        return self.parts[0][0]


def bounds(plan: Plan, assumptions: Assumptions) -> list[Bound]:
    """Return what bounds the phases of a plan, in the order of a step; phases that take no time are left out."""
    scenario, time = plan.scenario, plan.time
    own = passes(scenario, scenario.shape, assumptions)
    forward, backward = own.row.forward, own.row.backward
    found = [
        _decoding(scenario, time.generate, assumptions),
        _pass("old log-probs", scenario, time.old_log_probs, own.row, (1, 0), assumptions),
        _pass("training", scenario, time.train, own.row, (2 if scenario.recompute else 1, 1), assumptions),
        _optimizer(scenario, time.optimizer, assumptions),
        Bound("publication", time.publish, (("moving the weights", time.publish),), 0.0, 0.0),
        Bound("memory turns", time.memory_turns, (("copies to host memory and back", time.memory_turns),), 0.0, 0.0),
        Bound("host", time.host, (("the controller's work on trajectories", time.host),), 0.0, 0.0),
        Bound("checkpoint", time.checkpoint, (("writing", time.checkpoint),), 0.0, 0.0),
    ]
    assert forward > 0 and backward > 0
    return [bound for bound in found if bound.seconds > 0]


def _scaled(parts: dict[str, float], seconds: float) -> tuple[tuple[str, float], ...]:
    """Return parts that add up to `seconds`, the largest first."""
    total = sum(parts.values())
    scaled = [(words, seconds * part / total) for words, part in parts.items() if part > 0]
    return tuple(sorted(scaled, key=lambda part: -part[1]))


def _pass(
    name: str, scenario: Scenario, seconds: float, row: RowTime, times: tuple[int, int], assumptions: Assumptions
) -> Bound:
    """Return what passes over a step's tokens are bound by; `times` counts forward and backward passes."""
    packed = packing(scenario)
    ahead, back = times
    issue = sum(
        count * max(0.0, row.issue - busy)
        for count, busy in (
            (ahead, row.products + row.attention + row.memory + row.collectives),
            (back, 2 * row.products + 2.5 * row.attention + 2 * row.memory + row.collectives),
        )
    )
    work = {
        "matrix products": (ahead + 2 * back) * row.products,
        "attention": (ahead + 2.5 * back) * row.attention,
        "memory traffic between the products": (ahead + 2 * back) * row.memory,
        "collectives": (ahead + back) * row.collectives,
        "issuing kernels (micro-batches are too small)": issue,
    }
    filling = (scenario.parallel.pipeline - 1) / scenario.parallel.virtual_pipeline / packed.rows
    work["filling and emptying the pipeline"] = filling * sum(work.values())
    uneven = (1 - 1 / packed.imbalance) * sum(work.values())
    parts = {words: part / packed.imbalance for words, part in work.items()} | {"uneven rows": uneven}
    shape, share = scenario.shape, scenario.tokens / scenario.trainer_gpus * scenario.epochs
    pairs = shape.attention_layers * shape.heads * (shape.query_size + shape.value_size) * scenario.lengths.context / 2
    operations = share * 2 * ((ahead + 2 * back) * shape.active + (ahead + 2.5 * back) * pairs)
    spent = dict(_scaled(parts, seconds))
    traffic = spent.get("memory traffic between the products", 0.0) * _memory(scenario, assumptions)
    weights = sum(scenario.rank_parameters) * scenario.width * (ahead + back) * packed.rows * scenario.optimiser_steps
    return Bound(name, seconds, _scaled(parts, seconds), operations, traffic + weights)


def _memory(scenario: Scenario, assumptions: Assumptions) -> float:
    return assumptions.memory_efficiency * scenario.gpu.memory_gb_per_s * GIGA


def _optimizer(scenario: Scenario, seconds: float, assumptions: Assumptions) -> Bound:
    dense, experts = scenario.rank_parameters
    moved = optimizer_state_bytes(scenario) * 2 + (dense + experts) * 4 * 4
    reading = scenario.optimiser_steps * moved / _memory(scenario, assumptions)
    links = max(0.0, seconds - reading)
    words = "summing gradients and gathering parameters" + (", and host memory" if scenario.cpu_offload else "")
    parts = {"reading and writing its state": min(reading, seconds), words: links}
    return Bound("optimizer", seconds, _scaled(parts, seconds), 0.0, scenario.optimiser_steps * moved)


def _decoding(scenario: Scenario, seconds: float, assumptions: Assumptions) -> Bound:
    """Return what generation is bound by, from an engine's decoding step in its steady state."""
    decoder, load = make_decoder(scenario, assumptions), engine_load(scenario, assumptions)
    running = min(load.running, load.trajectories)
    cached = running * (scenario.lengths.prompt + scenario.lengths.response / 2)
    step = decoder.step(running, cached)
    work = load.trajectories * scenario.lengths.response
    steps = work / (running * decoder.accepted)
    parts = {words: steps * part for words, part in _step_parts(decoder, running, cached, step).items()}
    parts["reading prompts"] = load.prompts * scenario.lengths.prompt * decoder.prompt_token
    parts["the last, longest responses (few requests run)"] = max(0.0, alone(decoder, load) - sum(parts.values()))
    tokens = work + load.prompts * scenario.lengths.prompt
    operations = 2 * scenario.shape.active * tokens / scenario.engine_tensor
    speed = assumptions.decode_memory_efficiency * scenario.gpu.memory_gb_per_s * GIGA
    spent = dict(_scaled(parts, seconds))
    read = sum(part for words, part in spent.items() if words.startswith("reading the"))
    return Bound("generation", seconds, _scaled(parts, seconds), operations, read * speed)


def _step_parts(decoder: Decoder, running: int, cached: float, step: float) -> dict[str, float]:
    """Return what a decoding step is spent on: what is left of it when each cost is taken away in turn."""
    cheaper: dict[str, dict[str, Any]] = {
        "reading the weights": {"dense": 0.0, "experts": 0.0},
        "arithmetic": {"token": 0.0},
        "reading the KV cache": {"cached": 0.0, "state": 0.0},
        "latency of kernels": {"kernels": 0.0, "eager": 0.0},
        "all-reduces": {"reduce": 0.0, "reduce_token": 0.0},
        "sampling": {"sampling": 0.0},
        "the engine's scheduler": {"scheduler": 0.0, "scheduler_request": 0.0},
    }
    saved = {words: max(0.0, step - replace(decoder, **gone).step(running, cached)) for words, gone in cheaper.items()}
    total = sum(saved.values())
    return {words: part * step / total for words, part in saved.items()}


def attained(bound: Bound) -> float:
    """Return the 10^12 operations a second that a GPU reaches in a phase."""
    return bound.operations / bound.seconds / TERA
