"""This module turns operations, tokens and seconds of a step into the figures that people of pretraining read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

PASSES = ("old_log_probs", "reference", "train")
"""Phases in which the trainer computes; in the rest of a step the training ranks wait."""
TERA = 1e12
LEAST_SECONDS = 0.001
LEAST_SHARE = 0.01
"""Ranks with less than this, and less than this share of the slowest rank's time, do not take part in a phase."""


@dataclass(frozen=True)
class Work:
    """Holds what a step had to compute."""

    operations: Mapping[str, float]
    """By phase: "train", "old_log_probs", "reference", "generate"."""
    trained_tokens: float
    """Tokens of the trajectories that were trained on, prompts included; in each epoch again."""
    sampled_tokens: float
    """Tokens that the engines sampled."""


@dataclass(frozen=True)
class Devices:
    """Holds what a run computes on. On a machine without GPUs each rank and each rank of an engine is one."""

    training: int
    engines: int
    """0 where nothing is generated."""
    shared: bool
    """Whether engines and trainer take turns on the same devices."""
    peak_tflops: float | None
    """Peak of one device in dense products of the model's type; None if it is not known."""

    @property
    def all(self) -> int:
        return max(self.training, self.engines) if self.shared else self.training + self.engines


def throughput(work: Work, devices: Devices, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return TFLOP/s and MFU by phase and of the whole step, tokens per second, and the share of waiting.

    `seconds` are the step's "seconds/<phase>" and "seconds/total". A phase without a time has no figures; without a
    known peak nothing has an MFU.
    """
    total = seconds["seconds/total"]
    times = {phase: seconds.get(f"seconds/{phase}", 0.0) for phase in work.operations} | {"step": total}
    counts = {phase: devices.engines if phase == "generate" else devices.training for phase in work.operations}
    counts["step"] = devices.all
    operations = {**work.operations, "step": sum(work.operations.values())}
    found: dict[str, float] = {}
    for phase, count in operations.items():
        if count > 0 and times[phase] > 0 and counts[phase] > 0:
            rate = count / times[phase] / counts[phase] / TERA
            found[f"tflops_per_gpu/{phase}"] = rate
            if devices.peak_tflops:
                found[f"mfu/{phase}"] = rate / devices.peak_tflops
    if times.get("train", 0.0) > 0:
        found["tokens_per_second_per_gpu/train"] = work.trained_tokens / times["train"] / devices.training
    if times.get("generate", 0.0) > 0 and devices.engines:
        found["tokens_per_second_per_gpu/generate"] = work.sampled_tokens / times["generate"] / devices.engines
    busy = sum(seconds.get(f"seconds/{phase}", 0.0) for phase in PASSES)
    found["idle_share"] = min(1.0, max(0.0, 1.0 - busy / total)) if total > 0 else 0.0
    return found


def slowest(phase: str, seconds: Sequence[float], roles: Sequence[int]) -> dict[str, float]:
    """Return the rank that is furthest above the median of its peers in a phase, and by how much.

    `seconds` are the own seconds of each rank, without its waiting for other ranks; its peers are the ranks of the same
    role (`roles`, by rank) that take part in the phase, itself included. Without two peers nothing is returned.
    """
    least = max(LEAST_SHARE * max(seconds, default=0.0), 0.0 if phase == "probe" else LEAST_SECONDS)
    peers: dict[int, list[float]] = {}
    for role, value in zip(roles, seconds, strict=True):
        if value > 0 and value >= least:
            peers.setdefault(role, []).append(value)
    middles = {role: median(values) for role, values in peers.items() if len(values) > 1}
    found = [
        (value - middles[role], rank, middles[role])
        for rank, (role, value) in enumerate(zip(roles, seconds, strict=True))
        if role in middles
    ]
    if not found:
        return {}
    excess, rank, middle = max(found)
    return {
        f"slowest/{phase}/rank": float(rank),
        f"slowest/{phase}/excess_seconds": excess,
        f"slowest/{phase}/excess_share": excess / middle,
    }
