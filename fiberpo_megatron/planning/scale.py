"""This module says how a run scales from 8 to 10,240 GPUs: time by phase, what crosses ranks, and what stops first.

The batch grows with the GPUs up to a limit, because a batch of any size does not help learning. At each size the search
chooses layout and engines, with staleness 0 as this version's runs have. What the exchanges of this package carry is
counted from their code: `tools/scale_costs.py` measures what they cost.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Any

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.planning.collectives import GIGA
from fiberpo_megatron.planning.decoding import make_decoder
from fiberpo_megatron.planning.estimate import Plan
from fiberpo_megatron.planning.hardware import Assumptions, Gpu
from fiberpo_megatron.planning.lengths import longest
from fiberpo_megatron.planning.phases import LEADER_COPIES, token_bytes
from fiberpo_megatron.planning.roofline import bounds
from fiberpo_megatron.planning.search import Goal, Search
from fiberpo_megatron.planning.show import engines_text, layout_text, table
from fiberpo_megatron.planning.training import optimizer_state_bytes
from fiberpo_megatron.types import expert_dtype

SIZES = (8, 32, 128, 512, 1024, 4096, 10240)
TRAJECTORIES_PER_GPU = 8
LARGEST_BATCH = 64e6
"""Tokens of a step beyond which the batch does not grow with the GPUs."""
AGREEMENTS_STEP, AGREEMENTS_OPTIMISER = 10, 4
"""Times that all ranks agree in a step (`Layout.any_rank`, `agree`, `together`), and in each optimiser step besides."""
MESSAGE_S = 1e-4
"""Seconds of a small message between two hosts over Gloo (TCP), wake-up of the receiver included."""
GATHER_S, PACK_S = 0.17e-6, 0.07e-6
"""CPU seconds of a token in joining the shares on a leader, and in packing on every rank (measured)."""


@dataclass(frozen=True)
class Traffic:
    """These are the bytes that one rank receives in a step from the exchanges of this package."""

    gates: float
    """Sums of nodes, all-reduced in every optimiser step."""
    rollouts: float
    """The step's trajectories, which every rank gets, without routing."""
    routing: float
    """The engines' experts, if they are asked for, on the rank that gets most: a leader takes in those of its replica's
    tokens, and every token has a number. 0 for a dense model."""
    publication: float
    """Weights that leave rank 0, or with colocated engines the GPU's own copy."""
    agreement: float


@dataclass(frozen=True)
class ScaleRow:
    """This is one size."""

    gpus: int
    tokens: float
    """Of a step."""
    plan: Plan | None
    """None if no layout fits."""
    traffic: Traffic | None
    leader: float
    """Bytes of host memory that the batch takes on a leader at its peak."""
    machine: float
    """Bytes of host memory that rollouts take on the fullest machine."""
    checkpoint: float
    """Bytes of host memory that the fullest machine copies for an asynchronous checkpoint: its ranks' parameters and
    their shards of the optimizer's state. A synchronous one takes one tensor of each rank at a time."""
    stops: tuple[tuple[str, float], ...]
    """What more GPUs do not make faster, with its seconds of a step, the largest first."""


def sized(config: Config, gpus: int, assumptions: Assumptions) -> Config:
    """Return the config with the batch that it has on so many GPUs: whole groups, and equal mini-batches."""
    batch = config.batch
    mean = min(assumptions.prompt_tokens, config.data.max_prompt_tokens)
    mean += assumptions.response_share * config.rollout.max_response_tokens
    trajectories = min(TRAJECTORIES_PER_GPU * gpus, LARGEST_BATCH / mean)
    groups = max(1, round(trajectories / batch.samples_per_prompt / batch.mini_batches))
    prompts = groups * batch.mini_batches
    return config.model_copy(update={"batch": batch.model_copy(update={"prompts": prompts})})


def scale(
    config: Config,
    hf_config: Mapping[str, Any],
    memory: float,
    gpu: Gpu,
    assumptions: Assumptions,
    sizes: Iterable[int] = SIZES,
) -> list[ScaleRow]:
    """Return the best plan of every size. It takes some seconds a size."""
    rows = []
    for gpus in sizes:
        grown = sized(config, gpus, assumptions)
        search = Search(grown, hf_config, memory, gpu, assumptions, Goal(staleness=(0,)))
        found = search.run(gpus, count=1)
        rows.append(_row(gpus, found.plans[0] if found.plans else None, assumptions))
    return rows


def _row(gpus: int, plan: Plan | None, assumptions: Assumptions) -> ScaleRow:
    if plan is None:
        return ScaleRow(gpus, 0.0, None, None, 0.0, 0.0, 0.0, ())
    scenario = plan.scenario
    held = scenario.tokens * token_bytes()
    ranks = min(scenario.gpu.host_gpus, plan.training_gpus)
    leaders = max(1, ranks // scenario.parallel.model_ranks)
    stops = sorted(_stops(plan, assumptions).items(), key=lambda entry: -entry[1])
    return ScaleRow(
        gpus=gpus,
        tokens=scenario.tokens,
        plan=plan,
        traffic=_traffic(plan),
        leader=LEADER_COPIES * held,
        machine=ranks * held + leaders * (LEADER_COPIES - 1) * held,
        checkpoint=ranks * (optimizer_state_bytes(scenario) + scenario.width * sum(scenario.rank_parameters)),
        stops=tuple(stops),
    )


def _traffic(plan: Plan) -> Traffic:
    scenario, shape = plan.scenario, plan.scenario.shape
    routed = shape.moe_layers * shape.experts_per_token * expert_dtype(shape.experts).itemsize
    agreements = AGREEMENTS_STEP + AGREEMENTS_OPTIMISER * scenario.optimiser_steps
    return Traffic(
        gates=2.0 * scenario.optimiser_steps * sum(plan.gates),
        rollouts=scenario.tokens * token_bytes(),
        routing=scenario.tokens * (4 + routed / scenario.data) if routed else 0.0,
        publication=float(plan.publish),
        agreement=8.0 * agreements * ceil(log2(max(2, plan.training_gpus))),
    )


def _stops(plan: Plan, assumptions: Assumptions) -> dict[str, float]:
    """Return the seconds of a step that do not become fewer with more GPUs."""
    scenario, time = plan.scenario, plan.time
    parts = {bound.phase: dict(bound.parts) for bound in bounds(plan, assumptions)}
    training = parts["training"]
    network = assumptions.network_efficiency * scenario.gpu.network_gb_per_s * GIGA
    traffic = _traffic(plan)
    rounds = ceil(log2(max(2, plan.training_gpus)))
    agreements = AGREEMENTS_STEP + AGREEMENTS_OPTIMISER * scenario.optimiser_steps
    decoder, lengths = make_decoder(scenario, assumptions), scenario.lengths
    last = longest(lengths, scenario.generated)
    return {
        "the longest response": last * decoder.step(1, lengths.prompt + last / 2) / decoder.accepted,
        "filling the pipeline": training.get("filling and emptying the pipeline", 0.0),
        "uneven rows": training.get("uneven rows", 0.0),
        "gradients and parameters": max(
            (s for words, s in parts["optimizer"].items() if "summing" in words), default=0.0
        ),
        "publication": time.publish,
        "memory turns": time.memory_turns,
        "the controller": time.host,
        "rollouts to every rank": scenario.tokens * (token_bytes() / network + GATHER_S + PACK_S),
        "agreement": agreements * rounds * MESSAGE_S,
        "gates": traffic.gates / network + 2 * scenario.optimiser_steps * 2 * rounds * MESSAGE_S,
    }


HEADINGS = (
    *("GPUs", "M tokens", "layout of the trainer", "engines", "generate", "old log-probs", "train", "optimizer"),
    *("publish", "other", "step s", "tokens/s/GPU", "what stops first"),
)
TRAFFIC_HEADINGS = (
    *("GPUs", "gates", "rollouts", "routing", "publication", "agreement"),
    *("a leader's peak", "rollouts of a machine", "checkpoint of a machine"),
)


def scale_text(rows: Sequence[ScaleRow]) -> str:
    """Return two tables: seconds by phase, and bytes that a rank receives or holds."""
    times, bytes_ = [], []
    for row in rows:
        if row.plan is None or row.traffic is None:
            times.append([f"{row.gpus:,}", *[""] * (len(HEADINGS) - 2), "it does not fit"])
            continue
        time = row.plan.time
        shown = (time.generate, time.old_log_probs, time.train, time.optimizer, time.publish)
        name, seconds = row.stops[0]
        times.append(
            [
                f"{row.gpus:,}",
                f"{row.tokens / 1e6:.1f}",
                layout_text(row.plan),
                engines_text(row.plan),
                *(f"{value:.1f}" for value in shown),
                f"{time.total - sum(shown):.1f}",
                f"{time.total:.0f}",
                f"{row.tokens / time.total / row.gpus:.0f}",
                f"{name} ({100 * seconds / time.total:.0f} %)",
            ]
        )
        traffic = row.traffic
        sizes = (traffic.gates, traffic.rollouts, traffic.routing, traffic.publication, traffic.agreement)
        bytes_.append([f"{row.gpus:,}", *map(size_text, (*sizes, row.leader, row.machine, row.checkpoint))])
    return f"{table(HEADINGS, times)}\n\n{table(TRAFFIC_HEADINGS, bytes_)}"


def size_text(size: float) -> str:
    """Return bytes in a unit that leaves three digits."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size:.0f} B"


def scale_json(rows: Sequence[ScaleRow]) -> list[dict[str, Any]]:
    """Return the rows as numbers, in seconds and bytes."""
    return [
        {
            "gpus": row.gpus,
            "fits": row.plan is not None,
            "tokens": row.tokens,
            "seconds": asdict(row.plan.time) | {"total": row.plan.time.total} if row.plan else None,
            "received_bytes": asdict(row.traffic) if row.traffic else None,
            "leader_bytes": row.leader,
            "machine_bytes": row.machine,
            "checkpoint_bytes": row.checkpoint,
            "does_not_shrink": dict(row.stops),
        }
        for row in rows
    ]
