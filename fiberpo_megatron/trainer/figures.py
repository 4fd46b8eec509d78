"""This module measures the figures of a step: operations and tokens per second, memory, energy, goodput, slow ranks.

docs/watch.md (Figures) defines each. Every rank measures its own part; one small message of every rank brings them to
the rank that logs.
"""

import logging
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.planning.engines import engine_count
from fiberpo_megatron.planning.flops import TRAINING, forward_operations, sampling_operations
from fiberpo_megatron.planning.shapes import ModelShape, shape_of
from fiberpo_megatron.telemetry.goodput import Goodput
from fiberpo_megatron.telemetry.gpu import GIB, GpuMonitor
from fiberpo_megatron.telemetry.throughput import Devices, Work, slowest, throughput
from fiberpo_megatron.trainer.expectation import peak_tflops
from fiberpo_megatron.types import RolloutBatch

_log = logging.getLogger(__name__)
PHASES = (
    "tasks",
    "generate",
    "stored_rollouts",
    "pack",
    "old_log_probs",
    "reference",
    "train",
    "publish",
    "verify",
    "checkpoint",
    "probe",
)
"""Phases whose slowest rank is looked for, among the ranks of each pipeline stage. `probe` is a product of fixed size
on every rank."""
LEADERS = ("tasks", "generate")
"""Phases in which the leaders of replicas have other work than the other ranks."""
FACTS = ("memory", "reserved", "host", "joules", "checkpoint")
PROBE_SIZE = {"cpu": 256, "cuda": 2048}
"""Rows and columns of the probe's matrices: about 1 ms on a core, 0.1 ms on an H100."""
PROBES = 3


@dataclass
class Figures:
    """Gives the figures of each step. Every rank makes one and calls it after each step."""

    config: Config
    shape: ModelShape
    layout: Layout
    devices: Devices
    own: Callable[[], Mapping[str, float]]
    """Returns this rank's own seconds by phase in the step that has ended."""
    checkpoint_bytes: Callable[[], int]
    """Returns the size of the newest checkpoint on rank 0, and 0 elsewhere."""
    goodput: Goodput | None = None
    """It is on the rank that logs alone."""
    gpu: GpuMonitor = field(default_factory=GpuMonitor)
    _stages: list[int] = field(default_factory=list, init=False)
    """Pipeline stage by rank."""
    _leading: list[int] = field(default_factory=list, init=False)
    """A number by rank that is the same for the leaders of a stage, and for its other ranks."""
    clock: Callable[[], float] = time.time
    meters: bool = field(default_factory=lambda: os.environ.get("LOCAL_RANK", "0") == "0")
    """Whether this rank reads the energy of its machine's GPUs: one rank of each machine does."""

    def __post_init__(self) -> None:
        stage = getattr(self.layout, "pipeline_rank", 0)
        roles = self.layout.gather_json([stage, 2 * stage + self.layout.is_leader])
        self._stages, self._leading = [row[0] for row in roles], [row[1] for row in roles]
        if self.meters:
            self.gpu.energy()  # what was used before the first step is not the run's

    def __call__(
        self, step: int, rollouts: RolloutBatch, seconds: Mapping[str, float], kept: float
    ) -> dict[str, float]:
        """Return the metrics of a step on the rank that logs, and an empty mapping on the others.

        `seconds` are what the timers have read at its end, and `kept` is the share of the old log-probs' forward pass
        that training went on from. Every rank calls this at the same place.
        """
        rows = self.layout.gather_numbers(self._mine())
        if not rows:
            return {}
        phases = {name: [row[place] for row in rows] for place, name in enumerate(PHASES)}
        facts = {name: [row[len(PHASES) + place] for row in rows] for place, name in enumerate(FACTS)}
        found = throughput(self._work(rollouts, kept), self.devices, seconds)
        for name, values in phases.items():
            found |= slowest(name, values, self._leading if name in LEADERS else self._stages)
        if max(facts["memory"]) > 0:
            found["memory/peak_gib"] = max(facts["memory"])
            found["memory/reserved_peak_gib"] = max(facts["reserved"])
        found["memory/host_peak_gib"] = max(facts["host"])
        joules = [value for value in facts["joules"] if value >= 0]
        if joules:
            found["energy/joules"] = sum(joules)
            found["energy/joules_per_token"] = sum(joules) / max(1.0, self._trained_tokens(rollouts))
        found |= self._disk(max(facts["checkpoint"]))
        if self.goodput is not None:
            found |= self.goodput.step(step, seconds["seconds/total"], self.clock())
        return found

    def _mine(self) -> list[float]:
        own = dict(self.own())
        own["probe"] = probe_seconds(self._device)
        memory = reserved = 0.0
        if self._device == "cuda":
            memory, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
            torch.cuda.reset_peak_memory_stats()
        joules = self.gpu.energy() if self.meters else None
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        facts = [memory, reserved, host, -1.0 if joules is None else joules, self.checkpoint_bytes() / GIB]
        return [own.get(name, 0.0) for name in PHASES] + facts

    @property
    def _device(self) -> str:
        return str(getattr(getattr(self.layout, "device", None), "type", "cpu"))

    def _trained(self, rollouts: RolloutBatch) -> Any:
        """Return the lengths of the trajectories that were trained on."""
        kept = ~rollouts.truncated if self.config.algorithm.truncated == "leave_out" else slice(None)
        return rollouts.lengths[kept]

    def _trained_tokens(self, rollouts: RolloutBatch) -> float:
        return float(self._trained(rollouts).sum()) * self.config.batch.epochs

    def _work(self, rollouts: RolloutBatch, kept: float) -> Work:
        lengths = self._trained(rollouts)
        forward = forward_operations(self.shape, lengths)
        operations = {
            "old_log_probs": forward,
            "reference": forward,
            "train": (TRAINING * self.config.batch.epochs - kept) * forward,
        }
        sampled = float(rollouts.response_lengths.sum())
        if self.devices.engines:
            samples = len(rollouts.lengths) / (int(rollouts.groups[-1]) + 1) if len(rollouts.lengths) else 1.0
            prompts = rollouts.lengths - rollouts.response_lengths
            operations["generate"] = sampling_operations(self.shape, prompts, rollouts.lengths, samples)
        return Work(operations, self._trained_tokens(rollouts), sampled)

    def _disk(self, checkpoint: float) -> dict[str, float]:
        try:
            facts = os.statvfs(self.config.run.folder)
        except OSError as error:  # the next write into the folder says what is wrong with it
            _log.warning("the free room of %s is not known: %s", self.config.run.folder, error)
            return {}
        found = {"disk/free_gib": facts.f_bavail * facts.f_frsize / GIB}
        return found | ({"disk/checkpoint_gib": checkpoint} if checkpoint > 0 else {})


def probe_seconds(device: str) -> float:
    """Return the time of a product of fixed size on this rank's device, the median of PROBES.

    It depends on nothing but the device, so that a slow one shows even where the ranks wait for each other in every
    layer (expert parallelism) and so seem equally slow.
    """
    size = PROBE_SIZE[device]
    matrix = torch.zeros(size, size, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(PROBES + 1)]
        events[0].record()
        for event in events[1:]:
            torch.mm(matrix, matrix)
            event.record()
        events[-1].synchronize()
        return median(a.elapsed_time(b) for a, b in zip(events, events[1:])) / 1000
    times = []
    for _ in range(PROBES):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - began)
    return median(times)


MakeFigures = Callable[[int, RolloutBatch, Mapping[str, float], float], Mapping[str, float]]
"""Returns the figures of a step with these trajectories, seconds, and share of kept forward passes, as metrics."""


def no_figures(step: int, rollouts: RolloutBatch, seconds: Mapping[str, float], kept: float) -> Mapping[str, float]:
    """Return no metrics: this run measures no figures."""
    return {}


def make_figures(
    config: Config,
    hf_config: Mapping[str, Any],
    layout: Layout,
    own: Callable[[], Mapping[str, float]],
    checkpoint_bytes: Callable[[], int],
    goodput: Goodput | None,
) -> Figures:
    """Return the figures of a run whose ranks are those of `layout`."""
    engine = config.rollout.engine
    replayed = config.storage.replay is not None
    try:
        peak = peak_tflops(config)
    except (ValueError, OSError) as error:  # the plan says it to the person at the terminal
        _log.warning("there is no MFU, because the calibration cannot be used: %s", error)
        peak = None
    devices = Devices(
        training=layout.world_size,
        engines=0 if replayed else engine_count(config) * engine.tensor,
        shared=engine.colocated,
        peak_tflops=peak,
    )
    shape = shape_of(read_architecture(hf_config))
    return Figures(config, shape, layout, devices, own, checkpoint_bytes, goodput)
