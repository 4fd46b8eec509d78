"""This module estimates the seconds of a training step, phase by phase, as operations and bytes over given speeds.

It is a roofline model, not a simulation: nothing overlaps, all ranks are equally loaded except for the experts, and the
efficiencies of `hardware.Assumptions` are guesses. It is good for comparing layouts and for the order of magnitude.
"""

from dataclasses import dataclass
from math import ceil

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import Architecture
from fiberpo_megatron.planning.engines import (
    EnginePlan,
    engine_count,
    running_requests,
    touched_experts,
)
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.parameters import active_parameters, expert_parameters, model_parameters
from fiberpo_megatron.planning.reductions import gate_bytes, spans_micro_batches
from fiberpo_megatron.planning.states import DTYPE_BYTES, GRADIENT_BYTES, StateBytes, data_ranks

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Workload:
    """This is a training step in numbers."""

    trajectories: int
    prompt_tokens: float
    response_tokens: float
    """Both per trajectory, mean."""
    optimiser_steps: int
    micro_batches: int
    """Per data-parallel rank and optimiser step."""

    @property
    def tokens(self) -> float:
        return self.trajectories * (self.prompt_tokens + self.response_tokens)


def workload(config: Config, data: int, assumptions: Assumptions) -> Workload:
    """Return the step of a config over `data` data-parallel ranks."""
    batch = config.batch
    prompt = min(assumptions.prompt_tokens, config.data.max_prompt_tokens)
    response = max(1.0, assumptions.response_share * config.rollout.max_response_tokens)
    trajectories = batch.prompts * batch.samples_per_prompt
    per_rank = trajectories * (prompt + response) / (batch.mini_batches * data)
    return Workload(
        trajectories,
        prompt,
        response,
        batch.mini_batches * batch.epochs,
        max(1, ceil(per_rank / batch.micro_batch_tokens)),
    )


@dataclass(frozen=True)
class StepTime:
    """These are the seconds of each phase."""

    generate: float
    old_log_probs: float
    train: float
    optimizer: float
    publish: float

    @property
    def total(self) -> float:
        return self.generate + self.old_log_probs + self.train + self.optimizer + self.publish


def forward_operations(architecture: Architecture, tokens: float, length: float) -> float:
    """Return the floating-point operations of a forward pass: two per active parameter and token, and causal
    attention."""
    attention = 2 * architecture.layers * architecture.heads * architecture.head_dim * length  # (QK + PV) / 2
    return tokens * (2.0 * active_parameters(architecture) + attention)


def step_time(
    config: Config,
    architecture: Architecture,
    world_size: int,
    work: Workload,
    states: StateBytes,
    engine: EnginePlan,
    gpu: Gpu,
    assumptions: Assumptions,
) -> StepTime:
    """Estimate the phases of a step; `states` is the state of the fullest rank."""
    forward = _forward_seconds(config, architecture, world_size, work, gpu, assumptions)
    extra = (work.optimiser_steps - 1) / config.batch.mini_batches if spans_micro_batches(config) else 0.0
    passes = extra + config.batch.epochs * (4 if config.model.recompute == "full" else 3)
    network = assumptions.link_efficiency * gpu.network_gb_per_s * GIGA
    gates = work.optimiser_steps * 2 * sum(gate_bytes(config)) / network
    return StepTime(
        generate=_generate_seconds(config, architecture, work, engine, gpu, assumptions),
        old_log_probs=forward,
        train=forward * passes + gates,
        optimizer=work.optimiser_steps * _optimizer_seconds(config, world_size, states, gpu, assumptions),
        publish=publish_bytes(config, architecture) / network,
    )


def publish_bytes(config: Config, architecture: Architecture) -> int:
    """Return the bytes that reach every engine in one publication: the whole model in the trainer's type."""
    return model_parameters(architecture) * DTYPE_BYTES[config.model.dtype]


def _forward_seconds(
    config: Config, architecture: Architecture, world_size: int, work: Workload, gpu: Gpu, assumptions: Assumptions
) -> float:
    """Return the time of one pass over the step's tokens: arithmetic and collectives, stretched by the pipeline's idle
    share."""
    parallel = config.parallel
    length = work.prompt_tokens + work.response_tokens
    operations = forward_operations(architecture, work.tokens, length) / world_size
    seconds = operations / (assumptions.train_efficiency * gpu.tflops * TERA)
    seconds += _collective_seconds(config, architecture, world_size, work, gpu, assumptions)
    idle = (parallel.pipeline - 1) / (parallel.virtual_pipeline * work.micro_batches)
    return seconds * (1 + idle)


def _collective_seconds(
    config: Config, architecture: Architecture, world_size: int, work: Workload, gpu: Gpu, assumptions: Assumptions
) -> float:
    """Return the time of one rank's tensor-, context- and expert-parallel traffic in one pass over the step's
    tokens."""
    parallel, width = config.parallel, DTYPE_BYTES[config.model.dtype]
    layers = architecture.layers / parallel.pipeline
    data = world_size // parallel.model_ranks
    local = work.tokens / (data * parallel.context)
    row = local * architecture.hidden_size * width
    gathered = (parallel.tensor - 1) / parallel.tensor
    experts = architecture.experts
    blocks = 2 if experts is None else 1  # the traffic of experts is counted below
    seconds = layers * 2 * blocks * row * gathered / _link(parallel.tensor, gpu, assumptions)
    if parallel.context > 1:
        keys = local * 2 * architecture.key_value_heads * architecture.head_dim / parallel.tensor * width
        ring = parallel.tensor * parallel.context
        seconds += layers * (parallel.context - 1) * keys / _link(ring, gpu, assumptions)
    if experts is not None:
        ranks = parallel.expert * parallel.expert_tensor
        sent = row / parallel.tensor * experts.per_token * (ranks - 1) / ranks
        sent *= assumptions.expert_imbalance * parallel.expert_tensor
        seconds += layers * 2 * sent / _link(ranks, gpu, assumptions)
    return seconds


def _link(ranks: int, gpu: Gpu, assumptions: Assumptions) -> float:
    """Return the bytes per second between neighbouring ranks: NVLink inside a node, the network beyond it."""
    inside = ranks <= assumptions.gpus_per_node
    return assumptions.link_efficiency * GIGA * (gpu.nvlink_gb_per_s if inside else gpu.network_gb_per_s)


def _optimizer_seconds(
    config: Config, world_size: int, states: StateBytes, gpu: Gpu, assumptions: Assumptions
) -> float:
    """Return the time to sum gradients and gather parameters over the network, and of Adam's pass over its state."""
    ranks, _ = data_ranks(config.parallel, world_size)
    moved = states.gradients + states.gradients * DTYPE_BYTES[config.model.dtype] / GRADIENT_BYTES
    ring = ranks * config.parallel.tensor
    seconds = moved * (ranks - 1) / ranks / _link(ring, gpu, assumptions) if ranks > 1 else 0.0
    return seconds + 2 * states.optimizer / (assumptions.decode_efficiency * gpu.memory_gb_per_s * GIGA)


def _generate_seconds(
    config: Config,
    architecture: Architecture,
    work: Workload,
    engine: EnginePlan,
    gpu: Gpu,
    assumptions: Assumptions,
) -> float:
    """Return the time of all trajectories: prompts are read, then each decoding step is bound by memory or by
    arithmetic, whichever is slower."""
    tensor, engines = config.rollout.engine.tensor, engine_count(config)
    running = running_requests(config, engine, work.prompt_tokens + work.response_tokens, engines)
    held = running * (work.prompt_tokens + work.response_tokens / 2) * engine.cache_token
    experts = expert_parameters(architecture) / model_parameters(architecture)
    weights = engine.weights * (1 - experts + experts * touched_experts(architecture, running))
    speed = assumptions.decode_efficiency
    by_memory = (weights + held) / (speed * gpu.memory_gb_per_s * GIGA)
    operations = running * 2 * active_parameters(architecture) / tensor
    step = max(by_memory, operations / (speed * gpu.tflops * TERA))
    steps = max(work.trajectories * work.response_tokens / (engines * running), config.rollout.max_response_tokens)
    prompts = forward_operations(architecture, work.trajectories * work.prompt_tokens, work.prompt_tokens)
    reading = prompts / (engines * tensor) / (assumptions.prefill_efficiency * gpu.tflops * TERA)
    return reading + steps * step
