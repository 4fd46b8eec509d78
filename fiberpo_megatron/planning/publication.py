"""This module gives the seconds of a publication of weights and of a checkpoint, for each way of doing them."""

from math import ceil

from fiberpo_megatron.planning.collectives import GIGA
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.training import host_bandwidth, optimizer_state_bytes


def publish_seconds(scenario: Scenario, assumptions: Assumptions) -> float:
    """Return the time in which every engine gets the whole model.

    `broadcast`: one rank's adapter sends the whole model. `stages`: one rank of each pipeline stage sends its stage.
    Either way every node of engines takes the model in through the adapters of its domain, and every one of its GPUs
    sees all of it, because an engine's GPU takes its slices from whole tensors; these three follow one another for each
    bucket. `shards`: every training rank sends to the engines' GPUs what they need, so that the smaller side's adapters
    are the limit. `disk`: the model is written once and read by every node of engines. `device`: colocated engines
    take tensors from the same GPU, after they were gathered over the model-parallel ranks.
    """
    gpu, shape = scenario.gpu, scenario.shape
    model = float(shape.total * scenario.width)
    network = assumptions.network_efficiency * gpu.network_gb_per_s * GIGA
    nvlink = assumptions.nvlink_efficiency * gpu.nvlink_gb_per_s * GIGA
    domain = min(gpu.nvlink_domain, max(scenario.engine_gpus, 1))
    seen = model / (network * domain) + model / nvlink
    if scenario.publication == "broadcast":
        return model / network + seen
    if scenario.publication == "stages":
        return model / scenario.parallel.pipeline / network + seen
    if scenario.publication == "shards":
        needed = model * scenario.engines  # bytes that all engines together need
        return max(needed / scenario.engine_gpus, needed / scenario.trainer_gpus) / network
    if scenario.publication == "disk":
        nodes = ceil(scenario.engine_gpus / gpu.host_gpus)
        storage = assumptions.storage_gb_per_s * GIGA
        return model / storage + model * nodes / (storage * max(nodes, 1))
    across = model / (network * domain) if scenario.parallel.model_ranks > gpu.nvlink_domain else 0.0
    return (
        across
        + model / nvlink
        + model / scenario.engine_tensor / (assumptions.memory_efficiency * gpu.memory_gb_per_s * GIGA)
    )


def checkpoint_seconds(scenario: Scenario, assumptions: Assumptions) -> float:
    """Return the time that a step spends on checkpoints on average; 0 where none is counted.

    All nodes write weights and optimizer state, each its share. An asynchronous one costs the copy to host memory.
    """
    if not scenario.checkpoint_every:
        return 0.0
    state = optimizer_state_bytes(scenario)
    if scenario.checkpoint_asynchronous:
        return state / host_bandwidth(scenario, assumptions) / scenario.checkpoint_every
    nodes = ceil(scenario.trainer_gpus / scenario.gpu.host_gpus)
    total = scenario.shape.total * (12 + scenario.width)
    return total / nodes / (assumptions.storage_gb_per_s * GIGA) / scenario.checkpoint_every
