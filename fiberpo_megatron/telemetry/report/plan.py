"""This module compares a run with its plan: seconds by phase, the phase that is furthest off, and the likely causes.

A record has `planned/...` (before the start) and `expected/...` (with the trajectories that the step really had) beside
the measured values; `trainer/expectation.py` writes them. Causes are chosen by what the records themselves show.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fiberpo_megatron.telemetry.report.run_data import RunData, number, value_at

TIMERS: dict[str, tuple[str, ...]] = {
    "generate": ("generate",),
    "old_log_probs": ("old_log_probs",),
    "reference": ("reference",),
    "teacher": ("teacher",),
    "train": ("train",),
    "publish": ("publish", "verify"),
    "memory_turns": ("memory_turns",),
    "host": ("tasks", "stored_rollouts", "exchange", "pack"),
    "checkpoint": ("checkpoint",),
}
"""The run's timers that a phase of the plan stands for."""
NOTABLE = 0.1
"""A difference below this share of the planned time needs no explanation."""
TAIL = 3.0
"""A longest response of so many times the mean is a tail."""


@dataclass(frozen=True)
class Phase:
    """Holds the mean seconds of a phase over the steps that are compared."""

    name: str
    planned: float
    """Before the start."""
    expected: float
    """By the same plan, with the trajectories that the steps had."""
    measured: float

    @property
    def off(self) -> float:
        """Return the seconds by which it differs from its plan."""
        return self.measured - self.planned


@dataclass(frozen=True)
class Comparison:
    """Holds a run beside its plan."""

    phases: tuple[Phase, ...]
    total: Phase
    steps: int
    """Steps that are compared: all with a plan but the first of the run, whose start is in its time."""
    verdict: tuple[str, ...]
    """Sentences: the phase that is furthest from its plan, and the likely causes."""

    @property
    def furthest(self) -> Phase:
        """Return the phase whose difference costs a step the most seconds."""
        return max(self.phases, key=lambda phase: abs(phase.off))


def compare(data: RunData) -> Comparison | None:
    """Return the comparison of a run, or None when no record has a plan."""
    records = [record for record in data.records.get("train", []) if "expected/seconds/total" in record]
    if not records:
        return None
    records = records[1:] or records
    facts = Facts(records, data.config)
    phases = []
    for name, timers in TIMERS.items():
        planned, expected = facts.mean(f"planned/seconds/{name}"), facts.mean(f"expected/seconds/{name}")
        measured = sum(facts.mean(f"seconds/{timer}", 0.0) for timer in timers)
        if isfinite(planned) and isfinite(expected):
            phases.append(Phase(name, planned, expected, measured))
    if not phases:
        return None
    evaluated = facts.mean("seconds/evaluate", 0.0)
    total = Phase(
        "total",
        facts.mean("planned/seconds/total"),
        facts.mean("expected/seconds/total"),
        facts.mean("seconds/total") - evaluated,
    )
    furthest = max(phases, key=lambda phase: abs(phase.off))
    return Comparison(tuple(phases), total, len(records), tuple(_verdict(furthest, facts)))


class Facts:
    """Gives means of what records and config hold."""

    def __init__(self, records: list[dict[str, Any]], config: Mapping[str, Any]) -> None:
        self.records, self.config = records, config

    def mean(self, name: str, missing: float = float("nan")) -> float:
        """Return a metric's mean over the records; a record without it counts as `missing`, and nan is left out."""
        values = [number(record[name]) if name in record else missing for record in self.records]
        known = [value for value in values if isfinite(value)]
        return sum(known) / len(known) if known else missing

    def setting(self, *keys: str, default: Any = None) -> Any:
        """Return a setting of the run."""
        found = value_at(self.config, *keys)
        return default if found is None else found

    def names(self, prefix: str) -> list[str]:
        """Return the metrics that begin with `prefix`."""
        return sorted({name for record in self.records for name in record if name.startswith(prefix)})


def _verdict(phase: Phase, facts: Facts) -> list[str]:
    name = phase.name.replace("_", " ")
    if abs(phase.off) < NOTABLE * phase.planned:
        return [
            f"Every phase is near its plan: the largest difference, of {name}, is {_signed(phase.off)} s a step "
            f"({_share(phase.measured, phase.planned)})."
        ]
    lines = [
        f"Furthest from its plan is {name}: {phase.measured:.3g} s a step, planned {phase.planned:.3g} s "
        f"({_share(phase.measured, phase.planned)})."
    ]
    lengths, rest = phase.expected - phase.planned, phase.measured - phase.expected
    if abs(lengths) >= NOTABLE * phase.planned:
        lines.append(
            f"The trajectories that the steps had change the plan by {_signed(lengths)} s: the mean response was "
            f"{facts.mean('response_length/mean'):,.0f} tokens, planned were "
            f"{facts.mean('planned/response_length/mean'):,.0f}."
        )
    if abs(rest) < NOTABLE * phase.expected:
        return lines
    lines.append(f"A difference of {_signed(rest)} s is not explained by lengths.")
    if rest < 0:
        return [*lines, "The machine is faster here than the plan assumes; `fiberpo calibrate` measures its constants."]
    causes = [text for phases, find in CAUSES if phase.name in phases and (text := find(facts))]
    return [*lines, *(causes or ["No record shows a cause: " + UNKNOWN.get(phase.name, UNKNOWN["other"])])]


def _share(measured: float, planned: float) -> str:
    return f"{100 * (measured / planned - 1):+.0f} %" if planned else "not planned"


def _signed(seconds: float) -> str:
    return f"{seconds:+.2g}"


UNKNOWN = {
    "generate": "compare the engine's log (running requests, tokens per second) with the plan, or measure the machine "
    "with `fiberpo calibrate`.",
    "publish": "compare the network between trainer and engines with the plan's (`fiberpo doctor` times it).",
    "checkpoint": "`fiberpo doctor` times the disk.",
    "other": "measure the machine with `fiberpo calibrate`, under the load that the run has.",
}
"""What to do where no cause is seen."""

Find = Callable[[Facts], str | None]
PASSES = ("old_log_probs", "reference", "teacher", "train")


def _tail(facts: Facts) -> str | None:
    longest, mean = facts.mean("response_length/max"), facts.mean("response_length/mean")
    if not longest > TAIL * mean:
        return None
    return (
        f"The longest response has {longest / mean:.1f} times the mean's tokens: at the end of a step few requests are "
        "decoded together. More prompts a step, or a lower rollout.max_response_tokens, keeps the engines busier."
    )


def _queue(facts: Facts) -> str | None:
    engine = facts.setting("rollout", "engine", default={})
    count = len(engine.get("urls", [])) or engine.get("count", 1) * max(
        1, facts.setting("slurm", "engine_nodes", default=1)
    )
    asked = facts.setting("batch", "prompts", default=0) * facts.setting("batch", "samples_per_prompt", default=0)
    places = engine.get("max_running_requests", 0)
    if not places:  # the engines were sized from the batch
        return None
    waiting = asked / count - places
    if waiting <= 0:
        return None
    return (
        f"{asked / count:.0f} responses of a step meet {places} places on each engine "
        "(rollout.engine.max_running_requests), so that they wait in a queue; more engines or places shorten it."
    )


def _in_flight(facts: Facts) -> str | None:
    engine = facts.setting("rollout", "engine", default={})
    places = engine.get("max_running_requests", 0) * (len(engine.get("urls", [])) or engine.get("count", 1))
    allowed = facts.setting("rollout", "max_concurrent_requests", default=256) * (
        facts.setting("parallel", "data", default=1)
    )
    if allowed >= places:
        return None
    return (
        f"The trainer keeps {allowed} requests in flight, but the engines have {places} places; raise "
        "rollout.max_concurrent_requests."
    )


def _no_graphs(facts: Facts) -> str | None:
    arguments = facts.setting("rollout", "engine", "extra_args", default=[])
    if "--disable-cuda-graph" not in arguments:
        return None
    return "Engines run without CUDA graphs (--disable-cuda-graph), so that every decoding step waits for Python."


def _turns(facts: Facts) -> str | None:
    turns = facts.mean("turns/mean")
    if not turns > 1.05:
        return None
    return (
        f"A trajectory has {turns:.1f} turns: the plan knows neither the environment's work between them nor the "
        "reading of the conversation so far."
    )


def _failures(facts: Facts) -> str | None:
    failed = facts.mean("failed_share", 0.0)
    again = sum(facts.mean(name, 0.0) for name in facts.names("environment/") if name.endswith("/restarts"))
    if failed < 0.01 and again < 1:
        return None
    return f"Environments failed in {100 * failed:.1f} % of the trajectories; a step waits for their deadlines."


def _throttled(facts: Facts) -> str | None:
    held = max((facts.mean(name) for name in facts.names("gpu/") if name.endswith("/throttled")), default=0.0)
    return f"GPU clocks were held back {100 * held:.0f} % of the time (power or heat)." if held > 0.05 else None


def _packing(facts: Facts) -> str | None:
    useful, rows, planned = (
        facts.mean(name) for name in ("useful_token_share", "micro_batches", "expected/micro_batches")
    )
    if rows > planned * (1 + NOTABLE):
        return (
            f"A rank had {rows:.1f} micro-batches in a step, expected were {planned:.1f}: trajectories fill the rows "
            "of batch.micro_batch_tokens badly; a larger budget packs them better."
        )
    if useful < 1 - NOTABLE:
        return (
            f"Only {100 * useful:.0f} % of the computed positions are tokens, the rest is padding; a larger "
            "batch.micro_batch_tokens, or a smaller tensor or context size, packs better."
        )
    return None


def _imbalance(facts: Facts) -> str | None:
    uneven = facts.mean("load_imbalance")
    if not uneven > NOTABLE:
        return None
    return f"The most loaded data-parallel rank has {100 * uneven:.0f} % more positions than the mean; the others wait."


def _experts(facts: Facts) -> str | None:
    shares = [facts.mean(name) for name in facts.names("expert/mass/")]
    if len(shares) < 2 or not max(shares) * len(shares) > 1.5:
        return None
    return (
        f"The busiest expert partition gets {max(shares) * len(shares):.1f} times its even share of the tokens, and "
        "its rank is waited for in every layer."
    )


def _gates(facts: Facts) -> str | None:
    share = facts.mean("gate/time_share")
    if not share > 0.05:
        return None
    reduced = facts.mean("gate/reduce_share", 0.0)
    return (
        f"The objective's gates take {100 * share:.0f} % of a step, {100 * reduced:.0f} % of it in reductions, where "
        "ranks wait for the slowest."
    )


def _recompute(facts: Facts) -> str | None:
    kind = facts.setting("model", "recompute", default="none")
    if kind != "selective":
        return None
    return 'model.recompute = "selective" computes parts of each layer again, which the plan leaves out.'


def _recording(facts: Facts) -> str | None:
    if facts.setting("algorithm", "routing_replay", default="none") == "none":
        return None
    return "This pass also records or replays the experts of every token (algorithm.routing_replay)."


def _through_disk(facts: Facts) -> str | None:
    method = facts.setting("weight_sync", "method", default={})
    use = method.get("use") if isinstance(method, Mapping) else method
    folder = str(facts.setting("weight_sync", "folder", default=""))
    if use != "disk" or folder.startswith("/dev/shm"):
        return None
    return "Weights go through a folder on disk (weight_sync.folder); one in /dev/shm is faster on one machine."


def _full_checkpoints(facts: Facts) -> str | None:
    if facts.setting("checkpoint", "asynchronous", default=False):
        return None
    every = facts.setting("checkpoint", "every_steps", default=1)
    return (
        f"Training waits for each checkpoint, which is written every {every} steps: set "
        "checkpoint.asynchronous = true, or raise checkpoint.every_steps."
    )


CAUSES: tuple[tuple[tuple[str, ...], Find], ...] = (
    (("generate",), _turns),
    (("generate",), _failures),
    (("generate",), _tail),
    (("generate",), _queue),
    (("generate",), _in_flight),
    (("generate",), _no_graphs),
    (PASSES, _packing),
    (PASSES, _imbalance),
    (PASSES, _experts),
    (("train",), _gates),
    (("train",), _recompute),
    (("old_log_probs", "train"), _recording),
    (("publish",), _through_disk),
    (("checkpoint",), _full_checkpoints),
    (("generate", *PASSES), _throttled),
)
"""What may slow a phase down, with what finds it in the records: a sentence, or None when they show nothing."""
