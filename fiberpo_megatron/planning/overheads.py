"""This module adds what a step costs beside arithmetic and bytes: the constant costs that a calibration measures.

A GPU hides most of them behind its work, so that they are 0 without a calibration. On a CPU, and for a tiny model, they
are most of a step.
"""

from dataclasses import dataclass, replace

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.timing import StepTime
from fiberpo_megatron.planning.training import packing


@dataclass(frozen=True)
class Overheads:
    """These are constant costs in seconds; docs/planning.md (Calibration) says how each is measured."""

    pass_s: float = 0.0
    """A forward pass over a micro-batch, outside of the layers: schedule, embedding, log-probs."""
    layer_s: float = 0.0
    """A layer in such a pass."""
    backward_pass_s: float = 0.0
    """A backward pass over a micro-batch, outside of the layers."""
    backward_layer_s: float = 0.0
    """A layer in such a pass."""
    optimizer_s: float = 0.0
    """A step of the optimizer."""
    optimizer_layer_s: float = 0.0
    """A layer's parameters in such a step."""
    generate_s: float = 0.0
    """The first request of a generation: the network, the engine's waking."""
    response_s: float = 0.0
    """A response: its request as JSON, its place in the engine, and its answer."""
    publish_s: float = 0.0
    """The control calls of a publication."""
    publish_layer_s: float = 0.0
    """The export of a layer's tensors."""
    checkpoint_s: float = 0.0
    """A checkpoint, until it is complete."""
    checkpoint_layer_s: float = 0.0
    """A layer's tensors in a checkpoint."""


def with_overheads(time: StepTime, scenario: Scenario, config: Config, overheads: Overheads) -> StepTime:
    """Return the phases with their constant costs added. The check of a publication counts as part of it."""
    if overheads == Overheads():
        return time
    parallel = scenario.parallel
    layers = scenario.shape.layers
    local = layers / parallel.pipeline
    batches = max(1, scenario.optimiser_steps // scenario.epochs)
    rows = packing(scenario).rows + (parallel.pipeline - 1) / parallel.virtual_pipeline
    forward = overheads.pass_s + local * overheads.layer_s
    backward = overheads.backward_pass_s + local * overheads.backward_layer_s
    again = local * overheads.layer_s if scenario.recompute else 0.0
    over_step = batches * rows * forward
    responses = scenario.trajectories / scenario.engines * overheads.response_s
    checked = forward * parallel.pipeline + overheads.generate_s if config.weight_sync.verify_every == 1 else 0.0
    saved = (overheads.checkpoint_s + layers * overheads.checkpoint_layer_s) if scenario.checkpoint_every else 0.0
    return replace(
        time,
        generate=time.generate + overheads.generate_s + responses,
        old_log_probs=time.old_log_probs + (over_step if scenario.old_log_probs else 0.0),
        reference=time.reference + (over_step if scenario.reference else 0.0),
        train=time.train
        + scenario.optimiser_steps * rows * (forward + backward + again)
        + scenario.gate_passes * over_step,
        optimizer=time.optimizer
        + scenario.optimiser_steps * (overheads.optimizer_s + local * overheads.optimizer_layer_s),
        publish=time.publish + overheads.publish_s + layers * overheads.publish_layer_s + checked,
        checkpoint=time.checkpoint + saved / max(1, scenario.checkpoint_every),
    )
