"""This module writes the run folder for the loop: metrics, samples, checkpoints."""

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron.config import Config
from fiberpo_megatron.evaluation.results import IN_TRAINING, write_results
from fiberpo_megatron.interfaces import Layout, PendingSave, Policy
from fiberpo_megatron.mcore import checkpoint
from fiberpo_megatron.run_lock import RunLock
from fiberpo_megatron.telemetry.alarms.announce import Alarms
from fiberpo_megatron.telemetry.console import Console
from fiberpo_megatron.telemetry.gpu import GpuMonitor, gpu_metrics
from fiberpo_megatron.telemetry.metrics import Kind
from fiberpo_megatron.telemetry.rollout_log import EVALUATIONS, ROLLOUTS, trajectory_record, write_records
from fiberpo_megatron.telemetry.sinks import METRICS_FILE, Sinks, open_sinks, read_records
from fiberpo_megatron.telemetry.solve_rates import append_solve_rates, drop_solve_rates
from fiberpo_megatron.telemetry.step_files import StepFiles, spread
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.settings import CheckpointConfig
from fiberpo_megatron.types import RolloutGroup

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecorder:
    """Implements the loop's Recorder: metrics from the logging rank, samples from the first leader."""

    folder: Path
    layout: Layout
    sinks: Sinks | None
    """None on ranks that do not log."""
    gpu: GpuMonitor
    domains: Sequence[str]
    samples: int
    """Trajectories written per step."""
    kept: int
    """`telemetry.rollout_steps_kept`."""
    alarms: Alarms | None = None
    """None on ranks that do not log, and where nothing is written."""
    evaluations: bool = True
    """Whether samples and results of evaluations are written."""
    results: StepFiles = IN_TRAINING
    """Which files results of evaluations are written to."""
    results_of: Path | None = None
    """The run folder that they are written to; None: `folder`."""
    solve_rates: bool = False
    """Whether solved samples are counted by prompt."""

    def record(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        if self.sinks is not None:
            everything = {**metrics, **gpu_metrics(self.gpu.read())}
            self.sinks.write(step, kind, everything)
            if self.alarms is not None:
                self.alarms.see(kind, step, everything)

    def stopping(self) -> str | None:
        return None if self.alarms is None else self.alarms.stopping

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
        if self.layout.rank != 0 or not self.evaluations:
            return
        try:
            write_results(self.results.path(self.results_of or self.folder, step), step, sets)
            if self.results == IN_TRAINING:
                self.results.prune(self.folder, self.kept)
        except OSError as error:  # metrics.jsonl has the numbers: the run need not stop because of single prompts
            _log.warning("the results of the evaluation after %d steps are not written: %s", step, error)

    def _count_solved(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Append how often each prompt of a step was solved."""
        mine = [
            {
                "environment": self.domains[group.prompt.domain],
                "id": group.prompt.task.id or str(group.prompt.number),
                "solved": sum(bool(trajectory.correct) for trajectory in group.trajectories),
                "samples": len(group.trajectories),
            }
            for group in groups
            if group.trajectories
        ]
        found = self.layout.gather_json(mine, root_only=True)
        if self.layout.rank == 0:
            try:
                append_solve_rates(self.folder, step, (group for share in found for group in share))
            except OSError as error:
                _log.warning("the solve rates of step %d are not written: %s", step, error)

    def rollouts(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        kind: Kind = "train",
        *,
        places: Sequence[int] | None = None,
        looked_at: Sequence[RolloutGroup] | None = None,
    ) -> None:
        if kind == "train" and self.solve_rates:
            self._count_solved(step, groups if looked_at is None else looked_at)
        if not self.samples or (kind == "eval" and not self.evaluations):
            return
        order = (
            [(self.layout.data_rank, at) for at in range(len(groups))] if places is None else [(0, p) for p in places]
        )
        everywhere = self.layout.gather_json(
            [[*at, len(group.trajectories)] for at, group in zip(order, groups, strict=True)]
        )
        begins, sizes, count = dict[tuple[int, int], int](), list[int](), 0
        for rank, place, size in sorted(row for rows in everywhere for row in rows):  # only leaders have any
            begins[rank, place] = count
            sizes.append(size)
            count += size
        chosen = set(sampled([sizes], self.samples, kind))
        mine = [
            trajectory_record(step, begins[at] + i, trajectory, self.domains)
            for at, group in zip(order, groups)
            for i, trajectory in enumerate(group.trajectories)
            if begins[at] + i in chosen
        ]
        records = [record for share in self.layout.gather_json(mine, root_only=True) for record in share]
        if self.layout.rank == 0:
            try:
                records.sort(key=lambda record: int(record["trajectory"]))
                files = EVALUATIONS if kind == "eval" else ROLLOUTS
                write_records(self.folder, step, records, keep=self.kept, files=files)
            except OSError as error:  # they are for people: the other ranks need not stop because of them
                _log.warning("the sample rollouts of step %d are not written: %s", step, error)


def sampled(counts: Sequence[Sequence[int]], samples: int, kind: Kind) -> list[int]:
    """Return which trajectories are written, ascending, from how many each group of each data-parallel rank has.

    Those of a step are spread over all trajectories. Of an evaluation, the first one of some prompts is written, the
    same prompts every time.
    """
    sizes = [size for share in counts for size in share]
    if kind != "eval":
        return spread(samples, sum(sizes))
    firsts = [sum(sizes[:at]) for at in range(len(sizes))]
    return [firsts[at] for at in spread(samples, len(sizes)) if sizes[at]]


class RunCheckpoints:
    """Implements the loop's Checkpoints in <run folder>/checkpoints."""

    def __init__(
        self, folder: Path, settings: CheckpointConfig, lock: RunLock | None = None, sets: Sequence[str] = ()
    ) -> None:
        """`lock` is that of the run folder, on rank 0: nothing is written or deleted after another run took over.
        `sets`: names of the evaluation sets beside the default one."""
        self.folder, self._settings, self._lock, self._sets = folder, settings, lock, frozenset(sets)
        self.newest_bytes = 0
        """Size of the newest checkpoint that this process has completed, on rank 0."""
        self._pending: tuple[Policy, int, PendingSave] | None = None
        self._complete = 0

    def save(
        self,
        policy: Policy,
        step: int,
        *,
        prompts: Mapping[str, object],
        measured: Mapping[str, float],
        terms: Mapping[str, object] | None = None,
    ) -> None:
        """Save the state after `step` steps, or begin to; an earlier save is completed first."""
        self.complete(wait=True)
        metrics: dict[str, float] = {}
        with together(policy.layout, "saving a checkpoint"):
            if policy.layout.rank == 0:
                self._check_lock()
                metrics = self._best_value(measured)
        state = {"step": step, "prompts": dict(prompts), "metrics": metrics} | ({"terms": terms} if terms else {})
        folder = str(checkpoint.step_folder(self.folder, step))
        if self._settings.asynchronous:
            self._pending = policy, step, policy.begin_save(folder, state)
        else:
            policy.save(folder, state)
            self._saved(policy, step)

    def complete(self, wait: bool) -> int:
        """See the protocol."""
        if self._pending is not None and (wait or self._pending[2].written()):
            (policy, step, pending), self._pending = self._pending, None
            with together(policy.layout, "completing a checkpoint"):
                self._check_lock()
            pending.finish()
            self._saved(policy, step)
        return self._complete

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _best_value(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The metric by which the best is kept, if this step measured what it belongs to."""
        name = self._settings.keep_best_metric
        if name is None or not any(self._family(known) == self._family(name) for known in measured):
            return {}
        if name not in measured:
            raise ValueError(
                f"checkpoint.keep_best_metric = {name!r}: rank 0 knows no such metric; use one of {sorted(measured)}"
            )
        return {name: measured[name]}

    def _family(self, metric: str) -> tuple[str, str]:
        """What a metric is measured together with: its kind of record, and its evaluation set (the default's is "")."""
        kind, _, name = metric.partition("/")
        first = name.split("/")[0]
        return kind, first if first in self._sets else ""

    def _saved(self, policy: Policy, step: int) -> None:
        self._complete = step
        if policy.layout.rank == 0:
            self._check_lock()
            name, mode = self._settings.keep_best_metric, self._settings.keep_best_mode
            best = checkpoint.best(self.folder, name, mode) if name else None
            checkpoint.prune(self.folder, self._settings.keep, spare=[best] if best else [])
            files = checkpoint.step_folder(self.folder, step).rglob("*")
            self.newest_bytes = sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def open_recorder(
    config: Config,
    layout: Layout,
    domains: Sequence[str],
    start: int,
    steps: int,
    kinds: Sequence[Kind],
    title: str,
) -> Iterator[RunRecorder]:
    """Yield a recorder that writes records of `kinds` to the run folder; with none of them, only to the console."""
    with ExitStack() as stack:
        sinks, alarms = None, None
        hosts = layout.gather_json(socket.gethostname()) if kinds else []
        if layout.is_logger and kinds:
            sinks = open_sinks(
                config.run.folder,
                config.telemetry,
                title=title,
                first_step=start,
                total_steps=steps,
                kinds=kinds,
                config=shown_config(config),
            )
            alarms = Alarms(
                config.run.folder,
                config.telemetry.alarms,
                sinks.alarm,
                past=read_records(config.run.folder / METRICS_FILE),
                first_step=start,
                hosts=hosts,
            )
            stack.callback(alarms.close)
        elif layout.is_logger:
            sinks = Sinks([Console(title, total_steps=steps)])
        if sinks is not None:
            stack.enter_context(closing(sinks))
        telemetry = config.telemetry
        samples, kept = telemetry.rollouts_per_step, telemetry.rollout_steps_kept
        evaluations, solve_rates = "eval" in kinds, "train" in kinds
        with together(layout, "reading solve rates"):
            if layout.rank == 0 and solve_rates:
                drop_solve_rates(config.run.folder, start)
        yield RunRecorder(
            config.run.folder,
            layout,
            sinks,
            GpuMonitor(),
            domains,
            samples,
            kept,
            alarms,
            evaluations,
            solve_rates=solve_rates,
        )


def shown_config(config: Config) -> dict[str, Any]:
    """Return the config as JSON values for services that store it, without the secret address of a webhook."""
    values = config.model_dump(mode="json")
    if values["telemetry"]["alarms"]["webhook"] is not None:
        values["telemetry"]["alarms"]["webhook"] = "(an address)"
    return values


def restore(policy: Policy, root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Load the newest whole checkpoint of a run and return the state that it holds; empty where there is none.

    Damaged checkpoints are reported and skipped. Raises CheckpointError when all are damaged.
    """
    layout = policy.layout
    found = [str(folder) for folder in reversed(checkpoint.complete_steps(root))] if layout.rank == 0 else None
    paths = json.loads(layout.share_text(json.dumps(found) if found is not None else None))
    for path in paths:
        try:
            state = policy.load(path)
        except checkpoint.DamagedCheckpoint as error:
            say(f"WARNING: {error}")
            continue
        say(f"Resumed from {path}")
        return state
    if paths:
        raise checkpoint.CheckpointError(
            f"none of the {len(paths)} checkpoints in {root} is whole; restore one from a backup, or start again "
            "without --resume in another run folder"
        )
    say(f"No complete checkpoint in {root}: starting from the beginning")
    return {}


def last_report(folder: Path) -> str:
    """Write report.html of a run folder after its last step, and return a line that says where it is.

    The run has done what it was for. A report that cannot be written (a full disk, for example) is therefore a warning
    in this line and no error of the run.
    """
    try:
        from fiberpo_megatron.telemetry.report import write_report  # matplotlib: not for every start to pay

        return f"Report: {write_report(folder)}"
    except Exception as error:
        return (
            f"WARNING: the report could not be written ({type(error).__name__}: {error}). The run is complete; "
            f"`fiberpo report {folder}` writes the report"
        )
