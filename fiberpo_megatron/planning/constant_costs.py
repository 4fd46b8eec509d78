"""This module adds up what the constant costs of `Overheads` make of each phase of a step."""

from fiberpo_megatron.planning.overheads import Overheads
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.training import further_passes


def constant_costs(scenario: Scenario, overheads: Overheads, rows: int) -> dict[str, float]:
    """Return the seconds to add by the phase of `StepTime`, where a mini-batch has `rows` micro-batches on a rank.

    The check of a publication counts as a part of it.
    """
    parallel = scenario.parallel
    layers = scenario.shape.layers
    local = layers / parallel.pipeline
    batches = max(1, scenario.optimiser_steps // scenario.epochs)
    slots = rows + (parallel.pipeline - 1) / parallel.virtual_pipeline
    forward = overheads.pass_s + local * overheads.layer_s
    backward = overheads.backward_pass_s + local * overheads.backward_layer_s
    again = local * overheads.layer_s if scenario.recompute else 0.0
    whole_step = batches * slots * forward
    further = further_passes(scenario) * whole_step
    checked = parallel.pipeline * forward + overheads.generate_s if scenario.checked else 0.0
    saved = overheads.checkpoint_s + layers * overheads.checkpoint_layer_s
    return {
        "generate": overheads.generate_s + scenario.generated / scenario.engines * overheads.response_s,
        "old_log_probs": whole_step if scenario.old_log_probs else 0.0,
        "reference": whole_step if scenario.reference else 0.0,
        "train": scenario.optimiser_steps * slots * (forward + backward + again) + further,
        "optimizer": scenario.optimiser_steps * (overheads.optimizer_s + local * overheads.optimizer_layer_s),
        "publish": overheads.publish_s + layers * overheads.publish_layer_s + checked,
        "checkpoint": saved / scenario.checkpoint_every if scenario.checkpoint_every else 0.0,
    }
