"""This module takes the measures of one finished or stopped run, and their mean and spread over seeds."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fiberpo_megatron.telemetry.report.run_data import RunData, Series, load_run

OUTCOME_FILE = "outcome.json"
FINISHED = "finished"
LAST_STEPS = 10
"""Steps at the end of a run over which the accuracy of the rollouts is averaged."""

MEASURES: dict[str, str] = {
    "held_out_before": "held-out before",
    "held_out_final": "held-out final",
    "held_out_best": "held-out best",
    "accuracy_last": f"rollouts, last {LAST_STEPS} steps",
    "ratio_max": "max ratio",
    "gradient_norm_max": "max gradient norm",
    "entropy_end": "entropy at end (nats)",
}
"""Fields of `Result` that are averaged over seeds, with their titles. Accuracies are shares in [0, 1]."""


@dataclass(frozen=True)
class Outcome:
    """Records how a run ended; it is written beside the run's metrics."""

    text: str
    """"finished", or "stopped: <reason>"."""
    seconds: float
    """Wall time; of a run that was interrupted, at least the time of its steps."""

    def write(self, run_folder: Path) -> None:
        """Write outcome.json; from then on the run counts as done."""
        values = {"outcome": self.text, "seconds": round(self.seconds, 1)}
        (run_folder / OUTCOME_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_outcome(run_folder: Path) -> Outcome | None:
    """Return how the run in this folder ended; None while it has not."""
    path = run_folder / OUTCOME_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(values["outcome"], values["seconds"])


@dataclass(frozen=True)
class Result:
    """Holds one run's measures; a measure is None if the run stopped before it had a value."""

    objective: str
    seed: int
    outcome: str
    steps: int
    """Training steps recorded."""
    seconds: float
    held_out_before: float | None
    """Held-out accuracy of the warmed-up model."""
    held_out_final: float | None
    """The last held-out evaluation after training began."""
    held_out_best: float | None
    """The best of the evaluations after training began."""
    accuracy_last: float | None
    """Mean accuracy of the rollouts over the last `LAST_STEPS` steps."""
    ratio_max: float | None
    """Largest token importance ratio of the whole run."""
    gradient_norm_max: float | None
    """Largest gradient norm before clipping, of all optimiser steps."""
    entropy_end: float | None
    """Entropy of the next-token distribution at the last step (nats)."""


@dataclass(frozen=True)
class Run:
    """Holds a run that has ended, from which the table and the plots are made."""

    objective: str
    seed: int
    outcome: Outcome
    data: RunData

    def series(self, kind: str, name: str) -> Series | None:
        """Return a metric over the run's steps."""
        return self.data.series(kind, name)


def load_ended(objective: str, seed: int, folder: Path) -> Run | None:
    """Return the run in this folder, or None when it has not ended."""
    outcome = read_outcome(folder)
    return None if outcome is None else Run(objective, seed, outcome, load_run(folder))


def measure(run: Run) -> Result:
    """Return the measures of one run."""
    trained = run.data.records.get("train", [])
    held_out = run.series("eval", "accuracy")
    before = after = np.zeros(0)
    if held_out is not None:
        before = _finite(held_out.values[held_out.steps == 0])
        after = _finite(held_out.values[held_out.steps > 0])
    accuracy, ratio, norm, entropy = (
        _values(run, name) for name in ("accuracy", "ratio/max", "gradient_norm_max", "entropy")
    )
    return Result(
        objective=run.objective,
        seed=run.seed,
        outcome=run.outcome.text,
        steps=len(trained),
        seconds=run.outcome.seconds,
        held_out_before=float(before[0]) if before.size else None,
        held_out_final=float(after[-1]) if after.size else None,
        held_out_best=float(after.max()) if after.size else None,
        accuracy_last=float(accuracy[-LAST_STEPS:].mean()) if accuracy.size else None,
        ratio_max=float(ratio.max()) if ratio.size else None,
        gradient_norm_max=float(norm.max()) if norm.size else None,
        entropy_end=float(entropy[-1]) if entropy.size else None,
    )


def _values(run: Run, name: str) -> np.ndarray:
    series = run.series("train", name)
    return np.zeros(0) if series is None else series.finite


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


@dataclass(frozen=True)
class Spread:
    """Holds mean and sample standard deviation over seeds."""

    mean: float
    deviation: float | None
    """None for a single value."""
    count: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return the spread over the values that exist; None when there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def outcomes(results: Sequence[Result]) -> str:
    """Return `3 finished`, or `1 finished; seed 2 stopped after 12 steps: <reason>`."""
    finished = sum(result.outcome == FINISHED for result in results)
    parts = [f"{finished} finished"] if finished else []
    for result in results:
        if result.outcome != FINISHED:
            reason = result.outcome.removeprefix("stopped: ")
            parts.append(f"seed {result.seed} stopped after {result.steps} steps: {reason}")
    return "; ".join(parts)
