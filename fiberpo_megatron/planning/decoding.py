"""This module gives the seconds of one decoding step and of reading prompts on one engine."""

from dataclasses import dataclass
from math import ceil, exp
from statistics import NormalDist

from fiberpo_megatron.planning.collectives import GIGA, MICRO, all_reduce_seconds
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.scenario import Scenario

TERA = 1e12
_KERNELS_ATTENTION, _KERNELS_LATENT, _KERNELS_DENSE, _KERNELS_EXPERTS = 8, 12, 4, 9
"""Kernels of a layer while decoding: attention (latent attention and gated delta nets have more projections and norms),
and a dense MLP or experts, with the norm before each. Shared experts are a dense MLP."""
_GRAPH_STEP = 8
"""Engines capture CUDA graphs for multiples of this many requests; a batch is padded to the next one."""
_POPULARITIES = 8
_SAMPLING_PASSES = 6
"""How often sampling and log-probs read or write a float32 row of the vocabulary."""


@dataclass(frozen=True)
class Decoder:
    """These are the coefficients of an engine's decoding step, in seconds."""

    dense: float
    """Reading all weights but the experts."""
    experts: float
    """Reading all experts."""
    popularity: tuple[float, ...]
    """Probabilities with which a token goes to an expert, for equally many experts each; empty for a dense model."""
    token: float
    """Arithmetic of one token."""
    state: float
    """Reading and writing one request's state of linear attention."""
    cached: float
    """Reading the keys and values of one cached token."""
    kernels: float
    """Latency of the kernels, replayed from a CUDA graph."""
    eager: float
    """Time in which the engine issues the kernels without a graph."""
    graph_limit: float
    """Largest number of requests with a graph; 0 without graphs."""
    reduce: float
    """Latency of all all-reduces of a step."""
    reduce_token: float
    """Their time per token."""
    sampling: float
    """Sampling of one token."""
    scheduler: float
    scheduler_request: float
    layers: int
    draft_tokens: int
    accepted: float
    """Tokens of a response that one step makes; 1 without speculative decoding."""
    prompt_token: float
    """Reading one token of a prompt."""

    def step(self, running: int, cached: float) -> float:
        """Return the seconds of a step with `running` requests that have `cached` tokens together."""
        padded = -(-running // _GRAPH_STEP) * _GRAPH_STEP
        tokens = running * (1 + self.draft_tokens)
        read = self.dense
        if self.popularity:
            read += self.experts * (1 - sum((1 - each) ** tokens for each in self.popularity) / len(self.popularity))
        graph = running <= self.graph_limit
        arithmetic = (padded if graph else running) * (1 + self.draft_tokens) * self.token
        seconds = max(read, arithmetic) + self.cached * cached + self.state * running + self.kernels + self.reduce
        seconds += (self.reduce_token + self.sampling) * tokens
        seconds += self.draft_tokens * seconds / self.layers  # the draft model is one layer
        if not graph:
            seconds = max(seconds, self.eager)
        return seconds + self.scheduler + self.scheduler_request * running


def make_decoder(scenario: Scenario, assumptions: Assumptions) -> Decoder:
    """Return the decoding step of one of the scenario's engines."""
    shape, gpu, tensor, width = scenario.shape, scenario.gpu, scenario.engine_tensor, scenario.engine_width
    memory = assumptions.decode_memory_efficiency * gpu.memory_gb_per_s * GIGA
    routed = assumptions.expert_memory_efficiency * gpu.memory_gb_per_s * GIGA
    peak = gpu.tflops * TERA
    dense_layers = shape.layers - shape.moe_layers
    plain = shape.attention_layers if shape.cache_heads > 1 or shape.heads == 1 else 0
    mlps = dense_layers + (shape.moe_layers if shape.ffn else 0)
    kernels = plain * _KERNELS_ATTENTION + (shape.layers - plain) * _KERNELS_LATENT
    kernels += mlps * _KERNELS_DENSE + shape.moe_layers * _KERNELS_EXPERTS
    empty = all_reduce_seconds(tensor, 0.0, gpu, assumptions)
    one = all_reduce_seconds(tensor, float(shape.hidden * width), gpu, assumptions, small=True) - empty
    reduces = 2 * shape.layers
    further = ceil(tensor / gpu.host_gpus) - 1
    drafts, acceptance = scenario.draft_tokens, assumptions.draft_acceptance
    accepted = 1 + drafts if acceptance == 1 else (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    return Decoder(
        dense=(shape.dense_parameters + shape.table) * width / tensor / memory,
        experts=shape.expert_parameters * width / tensor / routed,
        popularity=_popularity(shape.experts_per_token / shape.experts, assumptions.expert_spread)
        if shape.experts
        else (),
        token=2 * shape.active / tensor / (assumptions.expert_matmul_efficiency * peak),
        state=2 * shape.state_bytes / tensor / memory,
        cached=shape.cache_bytes(tensor, width) / memory,
        kernels=kernels * assumptions.decode_kernel_us * MICRO,
        eager=kernels * assumptions.eager_kernel_us * MICRO,
        graph_limit=assumptions.graph_limit if scenario.graph_limit is None else scenario.graph_limit,
        reduce=reduces * empty,
        reduce_token=reduces * one,
        sampling=_SAMPLING_PASSES * 4 * shape.vocab / memory,
        scheduler=(assumptions.engine_step_ms + further * assumptions.engine_host_ms) / 1000,
        scheduler_request=assumptions.engine_request_us * MICRO,
        layers=shape.layers,
        draft_tokens=drafts,
        accepted=accepted,
        prompt_token=2 * shape.active / tensor / (assumptions.prefill_efficiency * peak),
    )


def _popularity(mean: float, spread: float) -> tuple[float, ...]:
    """Return the quantiles of a log-normal popularity with the given mean, at most 1."""
    normal = NormalDist(-(spread**2) / 2, spread)
    drawn = [exp(normal.inv_cdf((index + 0.5) / _POPULARITIES)) for index in range(_POPULARITIES)]
    scale = mean * _POPULARITIES / sum(drawn)
    return tuple(min(1.0, scale * each) for each in drawn)
