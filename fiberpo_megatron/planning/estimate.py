"""This module makes a plan: memory of every stage's fullest rank and of the engines, time of a step, bytes
transferred."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import Architecture, read_architecture
from fiberpo_megatron.mcore.optimizers import make_optimizer
from fiberpo_megatron.mcore.parallel.checks import check_layout
from fiberpo_megatron.planning.activations import Implementation, Row, activation_bytes, log_prob_bytes
from fiberpo_megatron.planning.engines import EnginePlan, engine_count, plan_engine
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.reductions import gate_bytes
from fiberpo_megatron.planning.states import Position, StateBytes, state_bytes
from fiberpo_megatron.planning.timing import GIGA, StepTime, Workload, publish_bytes, step_time, workload


@dataclass(frozen=True)
class StagePlan:
    """These are the bytes on one training GPU of a pipeline stage."""

    stage: int
    states: StateBytes
    activations: int
    log_probs: int
    """Short-lived buffers of the log-probs; 0 except on the last stage."""
    reserved: int

    offloaded: bool
    """Optimizer state is in host memory except during the optimizer's own step (`optimizer.cpu_offload`)."""

    @property
    def total(self) -> int:
        """Return the peak of a step; with offloading, optimizer state and activations are never on the GPU together."""
        passes = self.activations + self.log_probs
        moving = max(passes, self.states.optimizer) if self.offloaded else passes + self.states.optimizer
        return self.states.parameters + self.states.gradients + moving + self.reserved


@dataclass(frozen=True)
class Plan:
    """This is what a config needs."""

    config: Config
    architecture: Architecture
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
    config: Config, hf_config: Mapping[str, Any], gpus: int, memory: float, gpu: Gpu, assumptions: Assumptions
) -> Plan:
    """Plan a config on `gpus` GPUs of `memory` bytes. Raises ValueError if the layout does not divide."""
    training, serving = split_gpus(config, gpus)
    check_layout(hf_config, config.parallel, training)
    architecture = read_architecture(hf_config)
    parallel = config.parallel.model_copy(update={"data": training // config.parallel.model_ranks})
    config = config.model_copy(update={"parallel": parallel})
    work = workload(config, training // parallel.model_ranks, assumptions)
    stages = tuple(
        _stage(config, architecture, training, stage, work, assumptions) for stage in range(parallel.pipeline)
    )
    fullest = max(stages, key=lambda stage: stage.states.total)
    # colocated: while an engine generates, the trainer's parameters stay, its gradients and optimizer state do not
    taken = fullest.states.parameters if config.rollout.engine.colocated else 0
    engine = plan_engine(config, architecture, memory, taken)
    return Plan(
        config=config,
        architecture=architecture,
        gpu=gpu,
        memory=int(memory),
        training_gpus=training,
        engine_gpus=serving,
        work=work,
        stages=stages,
        engine=engine,
        time=step_time(config, architecture, training, work, fullest.states, engine, gpu, assumptions),
        publish=publish_bytes(config, architecture),
        gates=gate_bytes(config),
    )


def _stage(
    config: Config,
    architecture: Architecture,
    world_size: int,
    stage: int,
    work: Workload,
    assumptions: Assumptions,
    implementation: Implementation = "te",
) -> StagePlan:
    """Plan the rank of the first optimizer shard, which holds the most, because padding lies at the end of a buffer."""
    parallel, model = config.parallel, config.model
    tokens = config.batch.micro_batch_tokens
    share = work.response_tokens / (work.prompt_tokens + work.response_tokens)
    row = Row(tokens, int(tokens * share / parallel.context), assumptions.expert_imbalance)
    last = stage == parallel.pipeline - 1
    return StagePlan(
        stage=stage,
        states=state_bytes(
            architecture, model, parallel, world_size, Position(stage), make_optimizer(config.optimizer)
        ),
        activations=activation_bytes(
            architecture,
            model,
            parallel,
            row,
            stage=stage,
            micro_batches=work.micro_batches,
            implementation=implementation,
        ),
        log_probs=log_prob_bytes(architecture, model, parallel, row) if last else 0,
        reserved=int(assumptions.reserved_gb * GIGA),
        offloaded=config.optimizer.cpu_offload,
    )
