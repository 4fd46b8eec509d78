"""This module chooses the sizes of the engines that a run starts from the batch of the run, and gives its reasons."""

from fiberpo_megatron.config import Config
from fiberpo_megatron.engines.settings import EngineConfig

LARGEST_GRAPH = 512
"""Responses that one CUDA graph decodes at most: a larger one costs memory and saves little time beside its kernels."""
COLOCATED_PREFILL = 4096
"""Tokens that a colocated engine prefills at once: SGLang's 8192 on an 80 GB GPU take activations that the trainer's
parameters leave no room for."""
GRAPH_FLAGS = ("--cuda-graph-max-bs", "--cuda-graph-bs", "--cuda-graph-config", "--disable-cuda-graph")


def sized_engine(config: Config, gpu: bool) -> tuple[EngineConfig, list[str]]:
    """Return the settings of the engines with the sizes that follow from the batch, and a line with each reason.

    `gpu`: whether the engines run on GPUs; without one there are no CUDA graphs. What the settings or `extra_args` name
    is left as it is.
    """
    engine, batch = config.rollout.engine, config.batch
    running = config.running_requests
    step = batch.drawn_prompts * batch.samples_per_prompt
    reasons = [
        f"max_running_requests = {running}: "
        + ("as set" if engine.max_running_requests else f"one engine's share of a step of {step} responses")
    ]
    arguments: list[str] = []
    if gpu and not _given(engine, GRAPH_FLAGS):
        graph = min(running, LARGEST_GRAPH)
        arguments += ["--cuda-graph-max-bs-decode", str(graph)]
        reasons.append(f"CUDA graphs decode up to {graph} responses: as many as run together, {LARGEST_GRAPH} at most")
    if gpu and engine.colocated and not _given(engine, ("--chunked-prefill-size",)):
        arguments += ["--chunked-prefill-size", str(COLOCATED_PREFILL)]
        reasons.append(f"prefill takes {COLOCATED_PREFILL} tokens at once: the GPU also holds the trainer's parameters")
    if gpu and not _given(engine, ("--disable-radix-cache",)):
        shared = f"the {batch.samples_per_prompt} samples of a prompt, and " if batch.samples_per_prompt > 1 else ""
        reasons.append(f"the prefix cache is on: {shared}the turns of a conversation share their beginning")
    update = {"max_running_requests": running, "extra_args": [*arguments, *engine.extra_args]}
    return engine.model_copy(update=update), reasons


def _given(engine: EngineConfig, names: tuple[str, ...]) -> bool:
    """Return whether `extra_args` has an argument that begins with one of the names."""
    return any(argument.startswith(names) for argument in engine.extra_args)
