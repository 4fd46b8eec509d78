"""This module describes a run as its time depends on it: made from a config, or from a published point."""

from dataclasses import dataclass
from typing import Literal

from fiberpo_megatron.mcore.settings import ParallelConfig
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.lengths import Lengths
from fiberpo_megatron.planning.shapes import ModelShape

Publication = Literal["broadcast", "stages", "shards", "disk", "device"]
"""How weights reach engines: one rank broadcasts the model; a rank of each pipeline stage broadcasts its stage; every
rank sends its shards to the GPUs that need them; through a folder; or on the same GPU (colocated engines)."""


@dataclass(frozen=True)
class Scenario:
    """These are the numbers of a run that its time depends on."""

    shape: ModelShape
    gpu: Gpu
    trainer_gpus: int
    engine_gpus: int
    """GPUs that generate; the trainer's own where engines are colocated."""
    colocated: bool
    parallel: ParallelConfig
    engine_tensor: int
    prompts: int
    samples: int
    optimiser_steps: int
    lengths: Lengths
    row_tokens: int
    """Token budget of a packed row."""
    recompute: bool
    """Whether layers are computed again in the backward pass."""
    staleness: float = 0.0
    """Steps by which admitted trajectories may run ahead of the published weights (rollouts of step s need weights
    s - staleness)."""
    drain: bool = True
    """Whether a publication waits until no request is in flight; else engines pause and go on under new weights."""
    streaming: bool = False
    """Whether an optimiser step begins once enough trajectories have ended, whichever they are; else a step takes its
    own tickets, all of them."""
    oversample: float = 1.0
    """Trajectories that engines generate for each one that is trained on."""
    epochs: int = 1
    width: int = 2
    """Bytes of a parameter in the trainer."""
    engine_width: int = 2
    old_log_probs: bool = True
    """Whether the trainer computes the old log-probs in a pass of its own."""
    reference: bool = False
    """Whether a frozen reference model computes log-probs too."""
    reference_copies: int = 2
    """Copies of a rank's parameters between device and host that a reference pass takes: 2 where those of the policy
    are in host memory as well, and 4 where the two are exchanged, as `mcore/reference.py` does."""
    teacher: ModelShape | None = None
    """A teacher that scores every trajectory on the trainer's GPUs."""
    gate_passes: float = 0.0
    """Forward passes over a step's tokens that the gates need beside the ordinary ones, if none is kept."""
    kept_forwards: int = 0
    """Micro-batches of an optimiser step whose forward pass is the one that found the log-probs before it; a pipeline
    has none."""
    gate_bytes: int = 0
    """Bytes that the gates all-reduce in an optimiser step."""
    pinned: bool = True
    """Whether state waits in pinned host memory; else in pageable memory, which copies far slower."""
    cpu_offload: bool = False
    """Whether optimizer state waits in host memory except while the optimizer steps."""
    weights_to_host: bool = False
    """Whether colocated engines keep their weights in host memory while the trainer learns (vLLM's sleep level 1); else
    they drop them and get them by the next publication."""
    cache_gb: float | None = None
    """GB of KV cache on an engine's GPU; None: what `memory_share` leaves."""
    memory_share: float = 0.8
    """Share of a GPU for weights and KV cache of an engine."""
    running_limit: int = 1024
    """Requests that an engine decodes together at most."""
    graph_limit: int | None = None
    """Largest number of requests that an engine decodes from a CUDA graph; 0: it has none, None: the assumed one."""
    draft_tokens: int = 0
    """Tokens that speculative decoding drafts in each step."""
    prefix_sharing: bool = True
    """Whether samples of a prompt share its KV cache and its reading."""
    publication: Publication = "stages"
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: none is counted."""
    checkpoint_asynchronous: bool = False
    checked: bool = False
    """Whether a publication is followed by a check of what an engine says (`weight_sync.verify_every`)."""

    @property
    def trajectories(self) -> int:
        return self.prompts * self.samples

    @property
    def generated(self) -> int:
        """Return the trajectories that engines generate in a step."""
        return round(self.trajectories * self.oversample)

    @property
    def tokens(self) -> float:
        """Return the tokens of a step."""
        return self.trajectories * self.lengths.mean

    @property
    def data(self) -> int:
        """Return the data-parallel ranks."""
        return max(1, self.trainer_gpus // self.parallel.model_ranks)

    @property
    def engines(self) -> int:
        return max(1, self.engine_gpus // self.engine_tensor)

    @property
    def rank_parameters(self) -> tuple[float, float]:
        """Return a training rank's (dense parameters with its share of the tables, expert parameters)."""
        parallel, shape = self.parallel, self.shape
        dense = shape.dense_parameters / (parallel.tensor * parallel.pipeline)
        tables = shape.table * (1 if shape.tied else 2) / (parallel.tensor * parallel.pipeline)
        return dense + tables, shape.expert_parameters / (parallel.expert * parallel.expert_tensor * parallel.pipeline)


def running_requests(scenario: Scenario, assumptions: Assumptions) -> int:
    """Return how many requests an engine can decode together: its limit, and its KV cache at the mean length."""
    token = scenario.shape.cache_bytes(scenario.engine_tensor, scenario.engine_width)
    lengths = scenario.lengths
    # samples of one prompt share its cache; a running response is on average half written
    prompt = lengths.prompt / scenario.samples if scenario.prefix_sharing else lengths.prompt
    need = (prompt + lengths.context / 2) * token
    return max(1, min(scenario.running_limit, int(cache_bytes(scenario, assumptions) / need)))


def cache_bytes(scenario: Scenario, assumptions: Assumptions) -> float:
    """Return the bytes of KV cache on one GPU of an engine."""
    if scenario.cache_gb is not None:
        return scenario.cache_gb * 1e9
    weights = scenario.shape.total * scenario.engine_width / scenario.engine_tensor
    room = scenario.memory_share * scenario.gpu.memory_gb * 1e9 - weights - assumptions.engine_reserved_gb * 1e9
    return max(room, 0.0)
