"""This module makes a plan: memory of every stage's fullest rank and of the engines, time of a step, bytes
transferred."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import Architecture, read_architecture
from fiberpo_megatron.mcore.optimizers import Optimizer, make_optimizer
from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig
from fiberpo_megatron.mcore.parallel.checks import check_layout
from fiberpo_megatron.planning.activations import (
    Implementation,
    Row,
    activation_bytes,
    layer_bytes,
    log_prob_bytes,
)
from fiberpo_megatron.planning.engines import EnginePlan, engine_count, engine_dtype_bytes, plan_engine
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.lengths import Lengths
from fiberpo_megatron.planning.parameters import model_parameters, stage_layers
from fiberpo_megatron.planning.phases import Routes, kept_buffers, route_bytes
from fiberpo_megatron.planning.reductions import gate_bytes, spans_micro_batches
from fiberpo_megatron.planning.scenario import Publication, Scenario
from fiberpo_megatron.planning.shapes import shape_of
from fiberpo_megatron.planning.states import DTYPE_BYTES, Position, StateBytes, state_bytes
from fiberpo_megatron.planning.timing import GIGA, StepTime, step_time
from fiberpo_megatron.planning.training import packing

_PUBLICATIONS: dict[str, Publication] = {"distributed": "broadcast", "disk": "disk", "ipc": "device"}
"""The built-in ways of weight_sync.method; a custom one is planned as one that sends shards."""

KEPT_SHARE = 0.95
"""Share of a GPU's memory up to which further forward passes are kept: what saves time alone must not risk the run."""


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


@dataclass(frozen=True)
class StagePlan:
    """These are the bytes on one training GPU of a pipeline stage."""

    stage: int
    states: StateBytes
    activations: int
    log_probs: int
    """Short-lived buffers of the log-probs; 0 except on the last stage."""
    reserved: int
    """CUDA's context, NCCL, fragments, and buffers that are kept for publications."""
    offloaded: bool
    """Optimizer state is in host memory except during the optimizer's own step (`optimizer.cpu_offload`)."""
    reference: int = 0
    """Bytes in host memory that hold the reference of [algorithm.kl], or the policy while the reference computes."""
    routes: Routes = Routes()
    """Expert routing that is recorded or came from the engines."""
    forward: int = 0
    """What a pass without gradient holds at a time: one layer."""
    further: int = 0
    """Activations of each further micro-batch that `batch.kept_forwards` could keep; 0 where there is none."""

    @property
    def host(self) -> int:
        """Return the bytes that a rank keeps in host memory: an offloaded optimizer's state, the reference, routes."""
        return self.reference + self.routes.host + (self.states.optimizer if self.offloaded else 0)

    @property
    def total(self) -> int:
        """Return the peak of a step; with offloading, optimizer state and activations are never on the GPU together."""
        passes = self.activations + self.log_probs + self.routes.device
        moving = max(passes, self.states.optimizer) if self.offloaded else passes + self.states.optimizer
        return self.states.parameters + self.states.gradients + moving + self.reserved

    def further_forwards(self, memory: float) -> int:
        """Return how many further micro-batches' activations fit beside what the plan counts, on a GPU of `memory`
        bytes that is filled up to KEPT_SHARE."""
        resident = self.states.parameters + self.states.gradients + (0 if self.offloaded else self.states.optimizer)
        room = KEPT_SHARE * memory - resident - self.reserved - self.activations - self.log_probs - self.routes.device
        return max(0, int(room // self.further)) if self.further else 0


def most_kept_forwards(config: Config, stages: Sequence[StagePlan], work: Workload, memory: float) -> int:
    """Return the largest useful `batch.kept_forwards` that fits on GPUs of `memory` bytes, beside what the stages of
    this config hold, or 0 where no forward pass can be kept. More than an optimiser step's micro-batches change
    nothing."""
    more = min(stage.further_forwards(memory) for stage in stages)
    return min(config.kept_forwards + more, work.micro_batches) if config.kept_forwards else 0


@dataclass(frozen=True)
class Plan:
    """This is what a config needs."""

    config: Config
    architecture: Architecture
    scenario: Scenario
    """The same as its time depends on it."""
    gpu: Gpu
    memory: int
    """Bytes of one GPU."""
    training_gpus: int
    engine_gpus: int
    work: Workload
    stages: tuple[StagePlan, ...]
    engine: EnginePlan
    time: StepTime
    publish: int
    """Bytes that every engine receives in one publication."""
    gates: tuple[int, ...]
    """Bytes of the objective's all-reduces in one optimiser step."""

    @property
    def largest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def most_kept_forwards(self) -> int:
        """Return the largest useful `batch.kept_forwards` that fits, or 0 where no forward pass can be kept."""
        return most_kept_forwards(self.config, self.stages, self.work, self.memory)

    @property
    def problems(self) -> list[str]:
        """Return the reasons why the plan does not fit; the list is empty when it fits."""
        found = []
        training = self.largest.total
        if training > self.memory:
            found.append(
                f"training: stage {self.largest.stage} needs {training / GIGA:.1f} GB of {self.memory / GIGA:.0f} GB"
            )
        if not self.engine.fits:
            found.append(
                f"engine: {self.engine.cache_tokens} tokens of KV cache beside {self.engine.weights / GIGA:.1f} GB of "
                f"weights, the longest trajectory has {self.engine.longest}; raise rollout.engine.tensor"
            )
        return found


def split_gpus(config: Config, gpus: int) -> tuple[int, int]:
    """Return (training GPUs, engine GPUs), which are the same ones if engines are colocated.

    Raises ValueError when there are too few.
    """
    parallel, engine = config.parallel, config.rollout.engine
    serving = engine_count(config) * engine.tensor
    beside = 0 if engine.colocated else serving
    replicas = parallel.data or (gpus - beside) // parallel.model_ranks
    training = max(1, replicas) * parallel.model_ranks
    if max(training + beside, serving) > gpus:
        raise ValueError(
            f"training takes {training} GPUs and the engines {serving}{', shared' if engine.colocated else ''}; there "
            f"are {gpus}: use smaller [parallel] sizes or fewer engines, or rollout.engine.colocated = true"
        )
    return training, serving


def make_plan(
    config: Config,
    hf_config: Mapping[str, Any],
    gpus: int,
    memory: float,
    gpu: Gpu,
    assumptions: Assumptions,
    *,
    staleness: float = 0.0,
    drain: bool = True,
    fast: bool = False,
) -> Plan:
    """Plan a config on `gpus` GPUs of `memory` bytes.

    `staleness` is the number of steps by which trajectories may run ahead of the weights, and `drain` says whether a
    publication waits for those that run. `fast` takes the overlap from a closed form instead of a simulated queue.
    Raises ValueError if the layout does not divide.
    """
    training, serving = split_gpus(config, gpus)
    check_layout(hf_config, config.parallel, training)
    architecture = read_architecture(hf_config)
    parallel = config.parallel.model_copy(update={"data": training // config.parallel.model_ranks})
    config = config.model_copy(update={"parallel": parallel})
    gates = gate_bytes(config)
    scenario = make_scenario(config, architecture, training, serving, gpu, assumptions, sum(gates), staleness, drain)
    work = workload(scenario)
    stages = tuple(
        plan_stage(config, architecture, training, stage, work, assumptions) for stage in range(parallel.pipeline)
    )
    fullest = max(stages, key=lambda stage: stage.states.total)
    # colocated: while an engine generates, the trainer's parameters and the buffers of publications stay, its gradients
    # and optimizer state do not
    taken = fullest.states.parameters + kept_buffers(config) if config.rollout.engine.colocated else 0
    engine = plan_engine(config, architecture, memory, taken)
    scenario = replace(scenario, cache_gb=engine.cache / GIGA)
    return Plan(
        config=config,
        architecture=architecture,
        scenario=scenario,
        gpu=gpu,
        memory=int(memory),
        training_gpus=training,
        engine_gpus=serving,
        work=work,
        stages=stages,
        engine=engine,
        time=step_time(scenario, assumptions, fast),
        publish=model_parameters(architecture) * DTYPE_BYTES[config.model.dtype],
        gates=gates,
    )


def workload(scenario: Scenario) -> Workload:
    """Return a scenario's step in numbers."""
    return Workload(
        scenario.trajectories,
        scenario.lengths.prompt,
        scenario.lengths.response,
        scenario.optimiser_steps,
        packing(scenario).rows,
    )


def make_scenario(
    config: Config,
    architecture: Architecture,
    training: int,
    serving: int,
    gpu: Gpu,
    assumptions: Assumptions,
    gates: int,
    staleness: float,
    drain: bool,
) -> Scenario:
    """Return the run as its time depends on it."""
    batch, rollout, engine = config.batch, config.rollout, config.rollout.engine
    limit = rollout.max_response_tokens
    response = max(1.0, assumptions.response_share * limit)
    prompt = min(assumptions.prompt_tokens, config.data.max_prompt_tokens)
    steps = batch.mini_batches * batch.epochs
    spans = spans_micro_batches(config)
    in_flight = rollout.max_concurrent_requests * (config.parallel.data or 1) // engine_count(config)
    arguments = engine.extra_args
    graph_limit = 0 if "--disable-cuda-graph" in arguments else _number(arguments, "--cuda-graph-max-bs")
    return Scenario(
        shape=shape_of(architecture),
        gpu=gpu,
        trainer_gpus=training,
        engine_gpus=serving,
        colocated=engine.colocated,
        parallel=config.parallel,
        engine_tensor=engine.tensor,
        prompts=batch.prompts,
        samples=batch.samples_per_prompt,
        optimiser_steps=steps,
        lengths=Lengths(prompt, response, limit, assumptions.length_spread),
        row_tokens=batch.micro_batch_tokens,
        recompute=config.model.recompute == "full",
        staleness=staleness,
        drain=drain,
        oversample=batch.drawn_prompts / batch.prompts,
        epochs=batch.epochs,
        width=DTYPE_BYTES[config.model.dtype],
        engine_width=engine_dtype_bytes(config),
        gate_passes=(steps - 1) / batch.mini_batches if spans else 0.0,
        kept_forwards=config.kept_forwards,
        gate_bytes=gates,
        reference=reference_in_memory(config),
        reference_copies=4,
        cpu_offload=config.optimizer.cpu_offload,
        running_limit=max(1, min(config.running_requests, in_flight)),
        graph_limit=graph_limit,
        draft_tokens=_number(arguments, "--speculative-num-steps") or 0,
        publication="device" if engine.colocated else _PUBLICATIONS.get(config.weight_sync.method.use, "shards"),
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_asynchronous=config.checkpoint.asynchronous,
        checked=config.weight_sync.verify_every == 1,
    )


def reference_in_memory(config: Config) -> bool:
    """Return whether ranks keep reference weights in host memory, and compute with them in every step."""
    kl = config.algorithm.kl
    return kl.coefficient > 0 and kl.servers is None


def _number(arguments: list[str], name: str) -> int | None:
    """Return the value of an engine's argument, written `--name 8` or `--name=8`; None if it is not given."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return int(words[words.index(name) + 1]) if name in words else None


def plan_stage(
    config: Config,
    architecture: Architecture,
    world_size: int,
    stage: int,
    work: Workload,
    assumptions: Assumptions,
    implementation: Implementation = "te",
) -> StagePlan:
    """Plan the rank of the first optimizer shard, which holds the most, because padding lies at the end of a buffer."""
    optimizer = _optimizer(config.optimizer.model_dump_json(), type(config.optimizer))
    parallel, model = config.parallel, config.model
    activations, log_probs = passing_bytes(config, architecture, stage, work, assumptions, implementation)
    further = 0
    if config.kept_forwards:
        more = keeping(config, config.batch.kept_forwards + 1)
        further = passing_bytes(more, architecture, stage, work, assumptions, implementation)[0] - activations
    chunks = range(parallel.virtual_pipeline)
    layers = [layer for chunk in chunks for layer in stage_layers(architecture, parallel, stage, chunk)]
    row = Row(config.batch.micro_batch_tokens, 0, assumptions.expert_imbalance)
    states = state_bytes(architecture, config.model, config.parallel, world_size, Position(stage), optimizer)
    return StagePlan(
        stage=stage,
        states=states,
        activations=activations,
        log_probs=log_probs,
        reserved=int(assumptions.reserved_gb * GIGA) + kept_buffers(config),
        offloaded=config.optimizer.cpu_offload,
        reference=states.parameters if reference_in_memory(config) else 0,
        routes=route_bytes(config, architecture, stage, work.tokens),
        forward=max(
            layer_bytes(architecture, model, parallel, row, layer, implementation) for layer in (layers[0], layers[-1])
        ),
        further=further,
    )


def keeping(config: Config, count: int) -> Config:
    """Return a config that keeps `count` forward passes (`batch.kept_forwards`)."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"kept_forwards": count})})


@lru_cache(maxsize=16)  # a search asks for the same one beside every layout
def _optimizer(settings: str, section: type[OptimizerConfig]) -> Optimizer:
    return make_optimizer(section.model_validate_json(settings))


def passing_bytes(
    config: Config,
    architecture: Architecture,
    stage: int,
    work: Workload,
    assumptions: Assumptions,
    implementation: Implementation = "te",
) -> tuple[int, int]:
    """Return the bytes of a stage's activations, and of its log-prob buffers, at their peak."""
    parallel, model = config.parallel, config.model
    tokens = config.batch.micro_batch_tokens
    share = work.response_tokens / (work.prompt_tokens + work.response_tokens)
    row = Row(tokens, int(tokens * share / parallel.context), assumptions.expert_imbalance)
    kept = config.batch.kept_forwards if parallel.pipeline == 1 else 1
    activations = activation_bytes(
        architecture,
        model,
        parallel,
        row,
        stage=stage,
        micro_batches=work.micro_batches,
        implementation=implementation,
        kept=kept,
    )
    entropy = config.algorithm.entropy.coefficient > 0 or config.algorithm.entropy.target is not None
    on_last = stage == parallel.pipeline - 1
    return activations, log_prob_bytes(architecture, model, parallel, row, entropy) if on_last else 0
