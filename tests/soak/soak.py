"""This module measures what a long run takes of the machine: memory, threads, descriptors, sockets, files.

    python tools/soak.py --steps 10000 --out FOLDER

Growth is the slope of a least-squares line through the second half of the samples, when everything that is made once
has been made. `BOUNDS` says how much each quantity may grow; what grows more is named, and the command exits with 1.
"""

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fiberpo_megatron.environments.failure_log import LIMIT_BYTES
from fiberpo_megatron.environments.process import LOG_BYTES, descendants, resident_bytes
from fiberpo_megatron.interfaces import Recorder
from fiberpo_megatron.types import RolloutGroup
from tests.soak.engine import running_engine
from tests.soak.toy_run import run_toy, toy_config, toy_model

MIB = 2**20
SAMPLES, CLOSEST = 200, 5
"""Measurements in a run, and the fewest steps between two."""


@dataclass(frozen=True)
class Bound:
    """Says how much a quantity may grow over the second half of a run: `fixed`, and `per_step` for each step of it."""

    pattern: str
    """Regular expression of the quantity's whole name."""
    per_step: float
    fixed: float


BOUNDS = (
    Bound("trainer memory", per_step=512, fixed=8 * MIB),
    Bound("workers memory", per_step=128, fixed=4 * MIB),
    Bound("trainer objects", per_step=0.05, fixed=3000),
    Bound("trainer (threads|descriptors|sockets)", per_step=0, fixed=4),
    Bound("processes", per_step=0, fixed=1),
    # one record a step, and one of each evaluation
    Bound("bytes of metrics.jsonl", per_step=4096, fixed=0),
    Bound("bytes of tensorboard/.*", per_step=8192, fixed=0),
    Bound("bytes of console.log", per_step=512, fixed=0),
    Bound(r"bytes of environments/.*\.failures\.jsonl", per_step=0, fixed=LIMIT_BYTES),
    Bound(r"bytes of environments/.*\.log", per_step=0, fixed=LOG_BYTES),
    Bound("bytes of .*", per_step=0, fixed=64 * 1024),
    Bound("files", per_step=0, fixed=8),
)
"""The first bound whose pattern fits a quantity holds."""


@dataclass
class Watch:
    """Stands in front of the run's recorder and measures after every `every` training steps."""

    recorder: Recorder
    folder: Path
    engine: int
    """Process number of the toy engine, whose memory is not the run's."""
    every: int
    steps: list[int] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)

    def record(self, kind: Any, step: int, metrics: Mapping[str, float]) -> None:
        self.recorder.record(kind, step, metrics)
        if kind == "train" and step == 0:
            gc.freeze()  # what was imported is neither counted nor looked at again, which takes most of a second
        if kind == "train" and (step + 1) % self.every == 0:
            self.steps.append(step + 1)
            self.samples.append(measure(self.folder, self.engine))

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], kind: Any = "train", **about: Any) -> None:
        self.recorder.rollouts(step, groups, kind, **about)

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
        self.recorder.evaluation(step, sets)

    def stopping(self) -> str | None:
        return self.recorder.stopping()


def measure(folder: Path, engine: int) -> dict[str, float]:
    """Return what this process, its workers and a run folder take now, by the name of the quantity."""
    gc.collect()
    own = os.getpid()
    targets = [_target(entry.path) for entry in os.scandir(f"/proc/{own}/fd")]
    children = [pid for pid in descendants(own) if pid != own]
    return {
        "trainer memory": float(resident_bytes(own)),
        "workers memory": float(sum(resident_bytes(pid) for pid in children if pid != engine)),
        "trainer objects": float(len(gc.get_objects())),
        "trainer threads": float(len(os.listdir(f"/proc/{own}/task"))),
        "trainer descriptors": float(len(targets)),
        "trainer sockets": float(sum(target.startswith("socket:") for target in targets)),
        "processes": float(len(children)),
        **_files(folder),
    }


def _target(descriptor: str) -> str:
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:  # that of the listing itself, or one that was just closed
        return ""


def _files(folder: Path) -> dict[str, float]:
    """Return the bytes of a run folder by file, numbers in names left out, and the number of files."""
    sizes: Counter[str] = Counter()
    count = 0
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder)).replace(platform.node(), "HOST")
            sizes["bytes of " + re.sub(r"\d+", "N", name)] += path.stat().st_size
            count += 1
    return {**sizes, "files": count}


@dataclass(frozen=True)
class Growth:
    """Holds what a quantity grew by over the second half of a run, by the fitted line, and what it may grow by."""

    name: str
    growth: float
    allowed: float
    per_step: float

    @property
    def exceeded(self) -> bool:
        return self.growth > self.allowed


def growth_of(steps: Sequence[int], samples: Sequence[Mapping[str, float]]) -> list[Growth]:
    """Return the growth of every quantity; a quantity that a sample lacks (a file that was not there) was 0."""
    half = len(steps) // 2
    x = np.array(steps[half:], float)
    length = x[-1] - x[0]
    found = []
    for name in sorted({name for sample in samples for name in sample}):
        y = np.array([sample.get(name, 0.0) for sample in samples[half:]])
        slope = float(np.polyfit(x - x[0], y, 1)[0])
        bound = next(bound for bound in BOUNDS if re.fullmatch(bound.pattern, name))
        found.append(Growth(name, slope * length, bound.fixed + bound.per_step * length, slope))
    return found


def soak(steps: int, out: Path) -> list[Growth]:
    """Run the toy run in `out`/run, write `out`/soak.json and `out`/soak.png, and return the growth."""
    folder = out / "run"
    folder.mkdir(parents=True)
    watches: list[Watch] = []

    began = time.monotonic()
    with running_engine() as (url, engine), (folder / "console.log").open("w") as console, redirect_stdout(console):

        def watch(recorder: Recorder) -> Watch:
            watches.append(Watch(recorder, folder, engine, max(CLOSEST, steps // SAMPLES)))
            return watches[-1]

        try:
            run_toy(toy_config(folder, toy_model(out / "model"), url, steps), wrap=watch)
        finally:
            gc.unfreeze()
    seconds = time.monotonic() - began
    (seen,) = watches
    found = growth_of(seen.steps, seen.samples)
    result = {
        "steps": steps,
        "seconds": seconds,
        "measured_after": seen.steps,
        "samples": {g.name: [sample.get(g.name, 0.0) for sample in seen.samples] for g in found},
        "growth": {g.name: {"growth": g.growth, "allowed": g.allowed, "per_step": g.per_step} for g in found},
        "exceeded": [g.name for g in found if g.exceeded],
    }
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    _plot(seen, found, out / "soak.png")
    return found


def _plot(seen: Watch, found: Sequence[Growth], path: Path) -> None:
    """Draw every quantity over the steps."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * rows), layout="constrained")
    for number, growth in enumerate(found):
        axes = figure.add_subplot(rows, columns, number + 1)
        values = np.array([sample.get(growth.name, 0.0) for sample in seen.samples])
        unit, scale = ("MiB", MIB) if "memory" in growth.name or "bytes" in growth.name else ("", 1)
        axes.plot(seen.steps, values / scale, color="#D55E00" if growth.exceeded else "#0072B2", linewidth=1)
        axes.set_title(f"{growth.name} {unit}", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=80)


def table(found: Sequence[Growth]) -> str:
    """Return the growth as lines of text."""
    width = max(len(growth.name) for growth in found)
    lines = [f"{'':{width}}  {'grew by':>14}  {'may grow by':>14}  {'per step':>12}"]
    for growth in found:
        mark = "  TOO MUCH" if growth.exceeded else ""
        numbers = f"{growth.growth:14,.1f}  {growth.allowed:14,.1f}  {growth.per_step:12,.3f}"
        lines.append(f"{growth.name:{width}}  {numbers}{mark}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="training steps, at least 40 (default: 10000)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run, soak.json and soak.png")
    options = parser.parse_args(arguments)
    if options.steps < 40:
        parser.error(f"--steps {options.steps}: a line through the second half needs at least 40 steps")
    if options.out.exists():
        parser.error(f"--out {options.out} exists; name a new folder")
    found = soak(options.steps, options.out)
    print(table(found))
    bad = [growth.name for growth in found if growth.exceeded]
    if bad:
        print(f"These grow without a bound, or faster than they may: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0
