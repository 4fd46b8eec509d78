"""This module puts the phases of a training step together: what each takes, and how much of it passes at the same time.

docs/planning.md describes the model and its constants, and compares it with published runs.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from fiberpo_megatron.planning.collectives import GIGA
from fiberpo_megatron.planning.constant_costs import constant_costs
from fiberpo_megatron.planning.decoding import make_decoder
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.publication import checkpoint_seconds, publish_seconds
from fiberpo_megatron.planning.rollouts import Load, Schedule, alone, quick, simulate
from fiberpo_megatron.planning.scenario import Scenario, running_requests
from fiberpo_megatron.planning.training import (
    further_passes,
    host_bandwidth,
    optimizer_seconds,
    optimizer_state_bytes,
    packing,
    passes,
)

TERA = 1e12


@dataclass(frozen=True)
class StepTime:
    """These are the seconds of each phase of a step in the steady state."""

    generate: float
    """Generation of a step's trajectories, if the engines have nothing else to do."""
    old_log_probs: float
    reference: float
    """Log-probs of a frozen reference model."""
    teacher: float
    """Log-probs of a teacher."""
    train: float
    """Forward, recomputation and backward of all optimiser steps, and the gates."""
    optimizer: float
    publish: float
    memory_turns: float
    """Optimizer state to host memory and back, and the waking of colocated engines."""
    host: float
    """The controller's work on trajectories."""
    checkpoint: float
    """The share of a step that saving takes on average."""
    hidden: float
    """Time that passes beside another phase: generation beside training, where staleness allows it."""

    @property
    def update(self) -> float:
        """Return what published tables call the update: training and the optimizer."""
        return self.train + self.optimizer

    @property
    def training(self) -> float:
        """Return all that the trainer does with a step's trajectories."""
        return self.old_log_probs + self.reference + self.teacher + self.update + self.host + self.checkpoint

    @property
    def wait(self) -> float:
        """Return how long the trainer waits for trajectories in a step."""
        return max(0.0, self.total - self.training - self.publish - self.memory_turns)

    @property
    def total(self) -> float:
        """Return the time of a step."""
        return self.generate + self.training + self.publish + self.memory_turns - self.hidden


@lru_cache(maxsize=65536)
def step_time(scenario: Scenario, assumptions: Assumptions, fast: bool = False) -> StepTime:
    """Estimate the phases of a step.

    `fast` takes the overlap of generation and training from a closed form instead of the simulated queue.
    """
    own = passes(scenario, scenario.shape, assumptions)
    host = host_bandwidth(scenario, assumptions)
    # the reference model's weights come from host memory, and afterwards the trainer's come back
    swapped = scenario.reference_copies * sum(scenario.rank_parameters) * scenario.width / host
    reduced = assumptions.network_efficiency * scenario.gpu.network_gb_per_s * GIGA
    gates = scenario.optimiser_steps * 2 * scenario.gate_bytes / reduced
    train = own.train * scenario.epochs + own.forward * further_passes(scenario) + gates
    teacher = passes(scenario, scenario.teacher, assumptions).forward if scenario.teacher else 0.0
    turns = 0.0
    if scenario.colocated:
        turns = 2 * _parked_bytes(scenario) / host + assumptions.wake_s
    decoder = make_decoder(scenario, assumptions)
    load = engine_load(scenario, assumptions)
    phases = StepTime(
        generate=alone(decoder, load),
        old_log_probs=own.forward if scenario.old_log_probs else 0.0,
        reference=own.forward + swapped if scenario.reference else 0.0,
        teacher=teacher,
        train=train,
        optimizer=scenario.optimiser_steps * optimizer_seconds(scenario, assumptions),
        publish=publish_seconds(scenario, assumptions),
        memory_turns=turns,
        host=scenario.generated * assumptions.trajectory_ms / 1000,
        checkpoint=checkpoint_seconds(scenario, assumptions),
        hidden=0.0,
    )
    added = constant_costs(scenario, assumptions, packing(scenario).rows)
    phases = replace(phases, **{name: getattr(phases, name) + cost for name, cost in added.items()})
    if scenario.staleness == 0:
        return phases
    run = quick if fast else simulate
    schedule = Schedule(
        scenario.staleness,
        scenario.drain,
        scenario.optimiser_steps if scenario.streaming else 1,
        not scenario.streaming,
    )
    cycle = run(decoder, load, schedule, phases.training, phases.publish + phases.memory_turns)
    values = {name: getattr(phases, name) for name in StepTime.__dataclass_fields__}
    return StepTime(**{**values, "hidden": max(0.0, phases.total - cycle.step)})


def _parked_bytes(scenario: Scenario) -> float:
    """Return what moves to host memory and back on every GPU when colocated engines and the trainer take turns."""
    state = 0.0 if scenario.cpu_offload else optimizer_state_bytes(scenario)
    weights = scenario.shape.total * scenario.engine_width / scenario.engine_tensor
    return state + (weights if scenario.weights_to_host else 0.0)


def engine_load(scenario: Scenario, assumptions: Assumptions) -> Load:
    """Return what the busiest engine has to do in a step."""
    each = -(-scenario.generated // scenario.engines)
    return Load(
        lengths=scenario.lengths,
        trajectories=each,
        of_all=scenario.generated,
        running=running_requests(scenario, assumptions),
        prompts=-(-each // scenario.samples) if scenario.prefix_sharing else each,
    )
