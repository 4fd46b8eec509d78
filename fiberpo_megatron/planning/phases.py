"""This module says what a rank holds in each phase of a step, on its GPU and in host memory, saving included.

The ranks of a stage differ by the padding at the end of their optimizer shards, so that the first one, which has none,
stands for all. The leader of a data-parallel replica also holds the answers of its engines.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import Architecture
from fiberpo_megatron.planning.parameters import chunk_weights, experts_of, stage_layers
from fiberpo_megatron.planning.reductions import uses_experts
from fiberpo_megatron.types import TOKEN, RolloutBatch, expert_dtype

if TYPE_CHECKING:
    from fiberpo_megatron.planning.estimate import Plan, StagePlan

PHASES = ("generate", "exchange", "log-probs", "train", "optimizer", "publish", "save")
LEADER_COPIES = 5
"""Copies of the batch that a leader holds while it joins the shares (measured)."""


def token_bytes() -> int:
    """Return the bytes of one token in a batch of rollouts, without what a run may ask for (routing, scores)."""
    kept = [fact for fact in fields(RolloutBatch) if fact.metadata["per"] == TOKEN and fact.metadata["empty"] is None]
    return sum(fact.metadata["dtype"].itemsize for fact in kept)


def batch_bytes(config: Config, tokens: float) -> int:
    """Return the bytes of a step's batch on every rank; with routing each token has a number of four bytes more."""
    return int(tokens * (token_bytes() + (4 if config.needs_rollout_routing else 0)))


@dataclass(frozen=True)
class Routes:
    """These are the bytes of expert routing on one rank of a stage, and on the leader of its replica."""

    device: int = 0
    """What replay keeps on the GPU: one slice for each micro-batch in flight."""
    host: int = 0
    """The rank's own tokens and layers: what a pass recorded, and what the engines returned."""
    answers: int = 0
    """The leader's share of the engines' answers, all layers."""
    replica: int = 0
    """What a leader holds for its whole replica while the routes are exchanged."""


@dataclass(frozen=True)
class PhaseBytes:
    """These are the peaks of one phase on a rank of a stage."""

    stage: int
    phase: str
    device: int
    host: int
    leader: int
    """Host memory of the leader of a replica, where it is on this stage; the same as `host` on other stages."""


def route_bytes(config: Config, architecture: Architecture, stage: int, tokens: float) -> Routes:
    """Return what the routing of a step of so many tokens takes on a rank of a stage; nothing where none is kept.

    A token's experts take one byte for each layer and slot with up to 256 experts, else two. A rank has the rows that
    it routes itself: those of its data, context and tensor-parallel shares.
    """
    algorithm, parallel, experts = config.algorithm, config.parallel, architecture.experts
    returned = config.needs_rollout_routing
    replays = algorithm.routing_replay == "rollout"
    recorded = not replays and (
        returned or algorithm.routing_replay == "old" or (uses_experts(config) and algorithm.expert_routing == "old")
    )
    if experts is None or not (returned or recorded):
        return Routes()
    slot = experts.per_token * expert_dtype(experts.count).itemsize
    chunks = range(parallel.virtual_pipeline)
    layers = [layer for chunk in chunks for layer in stage_layers(architecture, parallel, stage, chunk)]
    own = slot * sum(experts_of(architecture, layer) is not None for layer in layers)
    every = slot * (architecture.layers - len(experts.dense_layers))
    data = parallel.data or 1
    rank = tokens / (data * parallel.context * parallel.tensor)
    row = config.batch.micro_batch_tokens / (parallel.context * parallel.tensor)
    flying = parallel.pipeline * parallel.virtual_pipeline if algorithm.routing_replay != "none" else 0
    flying += recorded  # a pass that records has one slice on the GPU until it is whole
    return Routes(
        device=int(flying * row * own),
        host=int((recorded + returned) * rank * own),
        answers=int(returned * tokens / data * every),
        replica=int(returned * tokens / data * every),
    )


def publication_buffers(config: Config) -> int:
    """Return the bytes of the GPU's buffers that carry a publication: one is sent while the next is made."""
    sync = config.weight_sync
    return 2 * (sync.bucket_mib or (0 if sync.method.use == "disk" else 256)) * 2**20


def kept_buffers(config: Config) -> int:
    """Return the bytes of those buffers that a rank keeps between publications: `ipc` shares the same ones always."""
    return publication_buffers(config) if config.weight_sync.method.use == "ipc" else 0


def phase_bytes(plan: "Plan") -> list[PhaseBytes]:
    """Return the peaks of every phase on every stage, in the order of a step."""
    return [found for stage in plan.stages for found in _of_stage(plan, stage)]


def saving_bytes(plan: "Plan", stage: "StagePlan") -> int:
    """Return the host memory that a checkpoint takes on the rank that writes most, which also writes the parameters.

    An asynchronous one copies all that the rank writes. Another one holds three times the largest float32 tensor: one
    that is written, its bytes, and the next one (measured by `tools/rank_memory.py`).
    """
    config, states, parallel = plan.config, stage.states, plan.config.parallel
    if config.checkpoint.asynchronous:
        masters = states.optimizer // 2 if config.model.dtype == "float32" else 0  # two moments lie beside each of them
        return states.parameters + states.optimizer + masters
    chunks = range(parallel.virtual_pipeline)
    weights = (chunk_weights(plan.architecture, parallel, stage.stage, chunk) for chunk in chunks)
    return 3 * 4 * max(weight.numel for of_chunk in weights for weight in of_chunk)


def _of_stage(plan: "Plan", stage: "StagePlan") -> list[PhaseBytes]:
    config, states = plan.config, stage.states
    colocated = config.rollout.engine.colocated
    away = states.optimizer if stage.offloaded else 0
    resident = states.parameters + states.gradients + states.optimizer - away + stage.reserved
    generating = states.parameters + stage.reserved if colocated else resident
    # the first optimiser step goes on from the old log-probs
    passing = (stage.activations if config.kept_forwards else stage.forward) + stage.log_probs + stage.routes.device
    sync = config.weight_sync
    bucket = publication_buffers(config) - kept_buffers(config)  # those that are kept are reserved
    device = {
        "generate": generating,
        "exchange": generating,
        "log-probs": resident + passing,
        "train": stage.total,
        "optimizer": resident + away,
        "publish": (generating if colocated else resident) + bucket,
        "save": resident + away,
    }
    batch = batch_bytes(config, plan.work.tokens)
    parked = stage.reference + (states.optimizer if colocated or stage.offloaded else 0)
    kept = stage.reference + away + batch + stage.routes.host
    kept += plan.publish // plan.training_gpus if sync.delta else 0  # what was published before, to compare with
    host = {
        "generate": parked,
        "exchange": parked + batch,
        "log-probs": kept,
        "train": kept,
        "optimizer": kept,
        "publish": kept + parked - stage.reference - away,
        "save": kept + saving_bytes(plan, stage),
    }
    share = int(batch / (config.parallel.data or 1)) + stage.routes.answers
    first = stage.stage == 0
    leader = {
        "generate": host["generate"] + first * share,
        "exchange": parked + first * (share + stage.routes.replica) + batch * (LEADER_COPIES if first else 1),
    } | {phase: host[phase] + first * stage.routes.answers for phase in PHASES[2:]}
    return [PhaseBytes(stage.stage, phase, device[phase], host[phase], leader[phase]) for phase in PHASES]
