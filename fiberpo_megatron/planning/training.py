"""This module gives the seconds of the trainer's passes and of its optimizer: rooflines of every part of a layer.

A pass over a packed row adds up the matrix products, attention, memory traffic of everything else, and collectives,
none of which overlap; it takes at least as long as Python needs to issue its kernels. Pipeline stages are balanced, as
published runs have them by giving the first and the last stage fewer layers.
"""

from dataclasses import dataclass

from fiberpo_megatron.planning.collectives import GIGA, MICRO, all_to_all_seconds, bandwidth
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.lengths import Packing, pack
from fiberpo_megatron.planning.scenario import Scenario
from fiberpo_megatron.planning.shapes import ModelShape

TERA = 1e12
_KERNELS_DENSE, _KERNELS_EXPERTS = 35, 70
"""Kernels of a layer's forward pass in the trainer (Megatron with Transformer Engine; the second with dispatch)."""


@dataclass(frozen=True)
class RowTime:
    """These are the seconds of one packed row on one pipeline stage, by what they are spent on."""

    products: float
    attention: float
    memory: float
    collectives: float
    issue: float
    """Time in which Python issues the kernels: a floor, not an addend."""

    @property
    def forward(self) -> float:
        return max(self.products + self.attention + self.memory + self.collectives, self.issue)

    @property
    def backward(self) -> float:
        """Return the time of the backward pass: twice the products and the traffic, 2.5 times attention, which computes
        its weights again."""
        return max(2 * self.products + 2.5 * self.attention + 2 * self.memory + self.collectives, self.issue)


def row_time(scenario: Scenario, shape: ModelShape, tokens: float, assumptions: Assumptions) -> RowTime:
    """Return the forward time of a row of `tokens` (over its context-parallel ranks) on one stage."""
    parallel, gpu, width = scenario.parallel, scenario.gpu, scenario.width
    local = tokens / parallel.context  # of one context-parallel rank
    shard = local / parallel.tensor
    peak = gpu.tflops * TERA
    memory = assumptions.memory_efficiency * gpu.memory_gb_per_s * GIGA
    dense_weights = shape.dense_parameters / parallel.tensor
    expert_weights = shape.expert_parameters / (parallel.expert * parallel.expert_tensor)
    busiest = assumptions.expert_imbalance if parallel.expert > 1 else 1.0
    products = max(
        2 * shape.dense_parameters * shard / (assumptions.matmul_efficiency * peak), dense_weights * width / memory
    )
    routed = busiest * shape.routed * shard
    products += max(2 * routed / (assumptions.expert_matmul_efficiency * peak), expert_weights * width / memory)
    products += 2 * shape.table * shard / (assumptions.matmul_efficiency * peak)
    # causal attention: a token attends to half of its trajectory on average
    pairs = shape.attention_layers * shape.heads * (shape.query_size + shape.value_size) * scenario.lengths.context / 2
    attention = 2 * pairs * shard / (assumptions.attention_efficiency * peak)
    traffic = shard * _traffic(shape, width)
    kernels = shape.moe_layers * _KERNELS_EXPERTS + (shape.layers - shape.moe_layers) * _KERNELS_DENSE
    stages = parallel.pipeline
    return RowTime(
        products=products / stages,
        attention=attention / stages,
        memory=traffic / memory / stages,
        collectives=_collectives(scenario, shape, local, busiest, assumptions) / stages
        + (local * shape.hidden * width / parallel.tensor / bandwidth(10**9, gpu, assumptions) if stages > 1 else 0.0),
        issue=kernels * assumptions.train_kernel_us * MICRO / stages,
    )


def _traffic(shape: ModelShape, width: int) -> float:
    """Return the bytes per token that everything between the matrix products reads and writes in a forward pass.

    The factors count how often a tensor of that size is read or written: around attention the norm, rotary embedding,
    attention and residual; around a dense MLP the norm, activation and residual; around experts the two permutations
    and their reversal (dispatch and combine), and the activation. Log-probs read and write rows of the vocabulary in
    float32.
    """
    queries = shape.heads * shape.query_size
    keys = shape.cache_heads * shape.cache_size
    attention = shape.layers * (8 * shape.hidden + 8 * queries + 4 * keys)
    dense = shape.layers * (6 * shape.hidden + 6 * shape.ffn)
    experts = shape.moe_layers * shape.experts_per_token * (11 * shape.hidden + 6 * shape.expert_ffn)
    return width * (attention + dense + experts) + shape.vocab * (width + 4 * 4)


def _collectives(
    scenario: Scenario, shape: ModelShape, local: float, busiest: float, assumptions: Assumptions
) -> float:
    """Return the tensor-, context- and expert-parallel traffic of a row over all layers."""
    parallel, gpu, width = scenario.parallel, scenario.gpu, scenario.width
    row = local * shape.hidden * width
    seconds = 0.0
    if parallel.tensor > 1:
        blocks = 2 * shape.layers - shape.moe_layers  # experts have an exchange of their own
        gathered = (parallel.tensor - 1) / parallel.tensor
        latency = assumptions.nvlink_latency_us * MICRO
        seconds += 2 * blocks * (row * gathered / bandwidth(parallel.tensor, gpu, assumptions) + latency)
    if parallel.context > 1:
        keys = local * shape.cache_heads * shape.cache_size / parallel.tensor * width
        ring = bandwidth(parallel.tensor * parallel.context, gpu, assumptions)
        seconds += shape.attention_layers * (parallel.context - 1) * keys / ring
    if shape.moe_layers:
        sent = busiest * row / parallel.tensor * shape.experts_per_token * parallel.expert_tensor
        ranks = parallel.expert * parallel.expert_tensor
        seconds += 2 * shape.moe_layers * all_to_all_seconds(ranks, sent, gpu, assumptions)
    return seconds


def packing(scenario: Scenario) -> Packing:
    """Return how the trajectories of one optimiser step fill the rows of a data-parallel rank."""
    batches = max(1, scenario.optimiser_steps // scenario.epochs)
    each = max(1, round(scenario.trajectories / batches / scenario.data))
    return pack(scenario.lengths, each, scenario.row_tokens, scenario.data, bool(scenario.shape.moe_layers))


def further_passes(scenario: Scenario) -> float:
    """Return the forward passes over a step's tokens that its optimiser steps take beside one each: those for the gates
    less those that are kept, for which the first optimiser step goes on from the old log-probs."""
    rows = packing(scenario).rows
    kept = min(scenario.kept_forwards, rows) / rows if scenario.parallel.pipeline == 1 else 0.0
    batches = max(1, scenario.optimiser_steps // scenario.epochs)
    return scenario.gate_passes * (1 - kept) - (kept / batches if scenario.old_log_probs else 0.0)


@dataclass(frozen=True)
class Passes:
    """These are the seconds of a step's passes on the slowest data-parallel rank."""

    forward: float
    """One forward pass over all tokens of a step."""
    train: float
    """Forward, recomputation and backward over all tokens of a step, once."""
    row: RowTime


def passes(scenario: Scenario, shape: ModelShape, assumptions: Assumptions) -> Passes:
    """Return the passes of a model of that shape in the scenario's layout."""
    packed = packing(scenario)
    batches = max(1, scenario.optimiser_steps // scenario.epochs)
    # with fewer trajectories than ranks some ranks have one, and the others wait for them
    each = max(1.0, scenario.trajectories / batches / scenario.data)
    tokens = each * scenario.lengths.mean / packed.rows
    row = row_time(scenario, shape, tokens * packed.imbalance, assumptions)
    # rows that the pipeline is filled and emptied with, in every mini-batch
    slots = packed.rows + (scenario.parallel.pipeline - 1) / scenario.parallel.virtual_pipeline
    again = row.forward if scenario.recompute else 0.0
    return Passes(
        forward=batches * slots * row.forward, train=batches * slots * (row.forward + again + row.backward), row=row
    )


def optimizer_seconds(scenario: Scenario, assumptions: Assumptions) -> float:
    """Return the time of one optimizer step: gradients are summed in float32, Adam passes over its state, parameters
    are gathered."""
    parallel, gpu = scenario.parallel, scenario.gpu
    dense, experts = scenario.rank_parameters
    per_stage = scenario.trainer_gpus // parallel.pipeline
    seconds = state = 0.0
    for count, stride in ((dense, parallel.tensor), (experts, parallel.expert * parallel.expert_tensor)):
        ranks = max(1, per_stage // stride)
        if ranks > 1:
            seconds += (
                count
                * (4 + scenario.width)
                * (ranks - 1)
                / ranks
                / _group_bandwidth(ranks, stride, scenario, assumptions)
            )
        state += count / ranks if parallel.distributed_optimizer else count
    memory = assumptions.memory_efficiency * gpu.memory_gb_per_s * GIGA
    # Adam reads and writes 12 bytes a parameter; clipping reads the gradients twice, and they are set to zero
    seconds += (state * 2 * 12 + (dense + experts) * 4 * 4) / memory
    if scenario.cpu_offload:
        seconds += state * 2 * 12 / host_bandwidth(scenario, assumptions)
    return seconds


def host_bandwidth(scenario: Scenario, assumptions: Assumptions) -> float:
    """Return the bytes a second of a copy between a GPU and host memory."""
    share = assumptions.pinned_copy_efficiency if scenario.pinned else assumptions.pageable_copy_efficiency
    return share * scenario.gpu.host_gb_per_s * GIGA


def optimizer_state_bytes(scenario: Scenario) -> float:
    """Return the bytes of master weights and moments on a rank."""
    parallel = scenario.parallel
    dense, experts = scenario.rank_parameters
    if not parallel.distributed_optimizer:
        return 12 * (dense + experts)
    per_stage = scenario.trainer_gpus // parallel.pipeline
    return 12 * (
        dense / max(1, per_stage // parallel.tensor)
        + experts / max(1, per_stage // (parallel.expert * parallel.expert_tensor))
    )


def _group_bandwidth(ranks: int, stride: int, scenario: Scenario, assumptions: Assumptions) -> float:
    """Return the bytes a second of a ring over `ranks` that lie `stride` apart.

    Where it leaves the domain, all its members in a domain share the traffic between domains over their adapters.
    """
    gpu = scenario.gpu
    if ranks * stride <= gpu.nvlink_domain:
        return bandwidth(ranks, gpu, assumptions)
    members = max(1, min(ranks, gpu.nvlink_domain // stride))
    network = members * assumptions.network_efficiency * gpu.network_gb_per_s * GIGA
    return min(network, assumptions.nvlink_efficiency * gpu.nvlink_gb_per_s * GIGA)
