"""This module evaluates the checkpoints of a run from beside it: `fiberpo eval RUN --follow`.

It is a run of its own in <run folder>/evaluations, with its own lock, engine and metrics.jsonl. It only reads what the
trainer writes, except that a checkpoint which is being read has hard links here: the trainer may delete it meanwhile.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from fiberpo_megatron.evaluation.results import BESIDE
from fiberpo_megatron.mcore.checkpoint.folders import CheckpointError, complete_steps, step_of
from fiberpo_megatron.run_lock import holder_of
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.loop import evaluate
from fiberpo_megatron.trainer.recorder import RunRecorder
from fiberpo_megatron.trainer.run import Run

POLL_S = 3.0
FIRST_CHECKPOINT_S = 3600.0
"""How long a run may take to begin. It is then taken for one that does not come."""
PROGRESS_S = 300.0
"""Seconds between two lines that say what is waited for."""


def follow(
    run: Run,
    folder: Path,
    *,
    once: bool,
    step: int | None,
    stop: Callable[[], bool],
    poll_s: float = POLL_S,
) -> list[int]:
    """Evaluate the checkpoints of the run in `folder` as they come, each once; return the evaluated steps.

    It ends when the last step's checkpoint was evaluated, when the run has ended, when `stop` says so, or, with `once`,
    when no checkpoint is left. `step` names the only one that is evaluated, even if it was before. A checkpoint that is
    damaged, or deleted before it could be linked, is skipped with a message. Every rank calls it.

    Raises ValueError when the checkpoint of `step` does not exist, and TimeoutError when the run does not begin within
    FIRST_CHECKPOINT_S seconds.
    """
    layout, last = run.layout, run.config.trainer.steps
    files, _ = BESIDE.stored(folder)
    seen = set() if step is not None else {number for number, _ in files}
    evaluated: list[int] = []
    patience = _Patience(folder, run.say)
    with run.source(last, ("eval",)) as (source, training):
        assert isinstance(training.recorder, RunRecorder)
        recorder = replace(training.recorder, results=BESIDE, results_of=folder)
        training = replace(training, recorder=recorder)
        while not layout.any_rank(stop()):
            decision: dict[str, Any] = {}
            with together(layout, "looking for checkpoints"):
                if layout.rank == 0:
                    decision = _next(folder, seen, step, once, last, patience)
            decision = json.loads(layout.share_text(json.dumps(decision) if layout.rank == 0 else None))
            if decision["do"] == "end":
                run.say(f"Evaluated {len(evaluated)} checkpoints: {decision['why']}")
                break
            if decision["do"] == "wait":
                time.sleep(poll_s)
                continue
            number = decision["step"]
            seen.add(number)
            began = time.monotonic()
            path = Path(decision["path"])
            try:
                with source.training(publishes=True):
                    run.policy.load(str(path))
            except CheckpointError as error:
                run.say(f"WARNING: the checkpoint after {number} steps is skipped: {error}")
                continue
            finally:
                layout.barrier()
                if layout.rank == 0 and path.parent == _links(folder):
                    shutil.rmtree(path.parent, ignore_errors=True)
            loaded = time.monotonic()
            source.publish(number)
            evaluate(training, number)
            evaluated.append(number)
            run.say(
                f"Evaluated the checkpoint after {number} steps in {time.monotonic() - began:.1f} s "
                f"(of which reading it took {loaded - began:.1f} s)"
            )
    return evaluated


class _Patience:
    """Says what is waited for, and for how long a run may take to begin."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._began = self._shown = time.monotonic()

    def wait(self, running: bool) -> None:
        """Note that nothing is to be done. Raises TimeoutError when the run does not begin."""
        now = time.monotonic()
        if running:
            self._began = now
        elif now - self._began > FIRST_CHECKPOINT_S:
            raise TimeoutError(
                f"no run has held {self._folder} and no checkpoint has come for {FIRST_CHECKPOINT_S:.0f} s; start the "
                "run, then this command again"
            )
        if now - self._shown > PROGRESS_S:
            self._shown = now
            self._say(f"Waiting for the next checkpoint of {self._folder} ...")

    def failed(self, error: OSError) -> None:
        """Report that the run folder could not be looked at; `wait` bounds how long this may go on."""
        self._say(f"WARNING: {self._folder} cannot be looked at, next try in {POLL_S:g} s: {error}")
        self.wait(running=False)


def _next(
    folder: Path, seen: Collection[int], step: int | None, once: bool, last: int, patience: _Patience
) -> dict[str, Any]:
    """Return what is done next, as JSON values: "evaluate" with step and path, "wait", or "end" with the reason."""
    try:
        running = holder_of(folder) is not None  # asked first: a run that ends now has its last checkpoint below
        found = {number: path for path in complete_steps(folder / "checkpoints") if (number := step_of(path))}
    except OSError as error:  # a file server that is away for a moment need not end this
        patience.failed(error)
        return {"do": "wait"}
    if step is not None and step not in found and step not in seen:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise ValueError(f"{folder} has no complete checkpoint after {step} steps; it has those after: {known}")
    pending = [number for number in sorted(found) if number not in seen and step in (None, number)]
    if pending:
        linked = _link(found[pending[0]], _links(folder))
        return {"do": "wait"} if linked is None else {"do": "evaluate", "step": pending[0], "path": str(linked)}
    if step is not None or once:
        return {"do": "end", "why": "there is no other one to evaluate"}
    if last in seen:
        return {"do": "end", "why": f"the last was the one after step {last}, the run's last"}
    if not running and found:
        return {"do": "end", "why": "the run has ended"}
    patience.wait(running)
    return {"do": "wait"}


def _links(folder: Path) -> Path:
    return folder / "evaluations" / "reading"


def _link(checkpoint: Path, root: Path) -> Path | None:
    """Return a folder with hard links to the files of a checkpoint, or the checkpoint itself where the file system
    makes none; None when it was deleted meanwhile."""
    shutil.rmtree(root, ignore_errors=True)
    target = root / checkpoint.name
    try:
        for path in sorted(checkpoint.rglob("*")):
            place = target / path.relative_to(checkpoint)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, place)
    except FileNotFoundError:
        return None
    except OSError:  # another file system, or one without hard links: then the checkpoint is read where it is
        shutil.rmtree(root, ignore_errors=True)
        return checkpoint
    return target if target.is_dir() else None
