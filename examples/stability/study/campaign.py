"""This module runs what is left of a stage of the study and keeps one line a run in a CSV file."""

from __future__ import annotations

import csv
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fiberpo_megatron.fibration import build_objective
from study.plan import Options, text_of, warm_up_of
from study.tasks import TASKS
from study.training import Cell, train, warm_up

MOST_AT_ONCE = 16
"""Runs that are computed at once."""


@dataclass(frozen=True)
class Row:
    """Holds one run, as a line of the CSV file."""

    stage: str
    task: str
    optimiser_steps: int
    learning_rate: float
    objective: str
    options: str
    """JSON with sorted keys."""
    seed: int
    start: float
    final: float
    ratio_max: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """Return what tells this run from all others."""
        return self.stage, self.cell, self.objective, self.options, self.seed

    @property
    def cell(self) -> str:
        """Return the name of the run's cell."""
        return f"{self.task}-{self.optimiser_steps}-{self.learning_rate:g}"


@dataclass(frozen=True)
class Job:
    """Holds runs that are computed at once: some configurations of one objective with some seeds in one cell."""

    stage: str
    cell: Cell
    objective: str
    configurations: tuple[Options, ...]
    seeds: tuple[int, ...]

    def rows(self, warm_ups: Mapping[int, torch.Tensor], *, steps: int | None = None) -> list[Row]:
        """Run them."""
        torch.set_num_threads(1)
        objectives = [build_objective(self.objective, **options) for options in self.configurations]
        starts = [warm_ups[warm_up_of(seed)] for seed in self.seeds]
        found = train(self.cell, objectives, self.seeds, starts, steps=steps)
        return [
            Row(
                self.stage,
                self.cell.task,
                self.cell.optimiser_steps,
                self.cell.learning_rate,
                self.objective,
                text_of(self.configurations[place]),
                seed,
                round(outcome.start, 5),
                round(outcome.final, 5),
                float(f"{outcome.ratio_max:.4g}"),
                round(outcome.seconds, 2),
            )
            for (place, seed), outcome in found.items()
        ]


def read_rows(file: Path) -> list[Row]:
    """Return the runs of a file; none if it does not exist."""
    if not file.is_file():
        return []
    kinds: dict[str, Callable[[str], object]] = {"optimiser_steps": int, "seed": int}
    numbers = ("learning_rate", "start", "final", "ratio_max", "seconds")
    kinds.update(dict.fromkeys(numbers, float))
    with file.open(newline="", encoding="utf-8") as lines:
        return [
            Row(**{name: kinds.get(name, str)(value) for name, value in line.items()})  # type: ignore[arg-type]
            for line in csv.DictReader(lines)
        ]


def append_rows(file: Path, rows: Sequence[Row]) -> None:
    """Add runs to a file."""
    new = not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plan(
    stage: str, cells: Sequence[Cell], tried: Mapping[str, Sequence[Options]], seeds: Sequence[int], done: Sequence[Row]
) -> list[Job]:
    """Return the jobs that are left of a stage, cell by cell, so that an interrupted one still compares equal cases."""
    known = {row.key for row in done}
    jobs = []
    for cell in cells:
        for objective, configurations in tried.items():
            left = [
                options
                for options in configurations
                if any((stage, cell.name, objective, text_of(options), seed) not in known for seed in seeds)
            ]
            size = max(1, MOST_AT_ONCE // len(seeds))
            jobs += [
                Job(stage, cell, objective, tuple(left[at : at + size]), tuple(seeds))
                for at in range(0, len(left), size)
            ]
    return jobs


def load_warm_ups(task: str, seeds: Sequence[int], folder: Path) -> dict[int, torch.Tensor]:
    """Return the warmed-up models of some seeds; those that the folder lacks are made and kept there."""
    files = {number: folder / f"{task}-{number}.pt" for number in sorted({warm_up_of(seed) for seed in seeds})}
    missing = [number for number, file in files.items() if not file.is_file()]
    if missing:
        print(f"Warming up {len(missing)} models of task {task!r}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        for number, parameters in warm_up(TASKS[task], missing).items():
            torch.save(parameters, files[number])
    return {number: torch.load(file) for number, file in files.items()}


def run(jobs: Sequence[Job], file: Path, warm_up_folder: Path, workers: int, *, steps: int | None = None) -> None:
    """Run jobs and append their runs to the file as they end; a run that the file has is not written again."""
    known = {row.key for row in read_rows(file)}
    began, total = time.monotonic(), sum(_size(job) for job in jobs)
    done = 0
    for job, rows in _results(jobs, warm_up_folder, workers, steps):
        append_rows(file, [row for row in rows if row.key not in known])
        done += _size(job)
        minutes = (time.monotonic() - began) / 60
        print(
            f"{job.stage}: {done} of {total} runs ({job.cell.name}, {job.objective}), {minutes:.1f} min, about "
            f"{minutes / done * (total - done):.1f} min left",
            flush=True,
        )


def _size(job: Job) -> int:
    return len(job.configurations) * len(job.seeds)


def _results(
    jobs: Sequence[Job], warm_up_folder: Path, workers: int, steps: int | None
) -> Iterator[tuple[Job, list[Row]]]:
    warm_ups = {
        task: load_warm_ups(task, [seed for job in jobs if job.cell.task == task for seed in job.seeds], warm_up_folder)
        for task in dict.fromkeys(job.cell.task for job in jobs)
    }
    if workers == 1:
        for job in jobs:
            yield job, job.rows(warm_ups[job.cell.task], steps=steps)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(job.rows, warm_ups[job.cell.task], steps=steps): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def options_of(text: str) -> Options:
    """Return the options that a line of the file holds."""
    found: Options = json.loads(text)
    return found
