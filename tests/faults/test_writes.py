"""Every place where a run changes its folder fails in turn: the disk is full, read-only, or a file has vanished.

A run then stops with one message that names the file, the cause and the fix, and what was committed can be resumed to
exactly the result of a run without faults; or it goes on with a warning, where it only lost what it can do without.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.mcore.checkpoint.folders import complete_steps, damaged_files, describe
from fiberpo_megatron.run_lock import RunLocked
from fiberpo_megatron.telemetry.sinks import read_records
from fiberpo_megatron.trainer.tasks import Tasks, start_tasks
from tests.faults.injection import Faults, Site, injected
from tests.soak.engine import running_engine
from tests.soak.toy_run import ToyLayout, run_toy, toy_config, toy_model

STEPS = 2
IMPORTANT = [
    Site("write", "metrics.jsonl"),
    Site("write", "rollouts/.step_N.jsonl.partial"),
    Site("write", "tokens/.step_N.jsonl.gz.partial"),
    Site("write", "traces/.step_N.json.gz.partial"),
    Site("write", "solve_rates.jsonl"),
    Site("write", ".engines.json.partial"),
    Site("sync", "dump/step_N.unfinished/rank_N.N"),
    Site("read", "metrics.jsonl"),
    Site("write", "dump/step_N.unfinished/rank_N.N"),
    Site("write", "checkpoints/.step-N.partial/table.pt"),
    Site("rename", "checkpoints/step-N"),
    Site("remove", "checkpoints/.step-N.partial"),
    Site("write", "published/N/model.safetensors.index.json"),
    Site("open", "published/N/.published"),
    Site("remove", "published/N"),
    Site("write", "tensorboard/events.out.tfevents.N.HOST.N.N"),
]
ERRORS = {
    "open": (errno.EROFS, errno.EACCES, errno.ENOENT),
    "write": (errno.ENOSPC,),
    "sync": (errno.ENOSPC, errno.EIO),
    "rename": (errno.ENOENT, errno.EROFS),
    "make folder": (errno.ENOSPC, errno.EROFS, errno.ENOENT),
    "remove": (errno.EROFS, errno.EACCES),
    "read": (errno.ENOENT,),
}
"""How an operation fails; the first of them in every run of the tests."""
EITHER = re.compile(r"\w.* (lock/|tensorboard)")
"""The first write decides here: it stops a run, later ones do not."""
GOES_ON = re.compile(
    r"\w.* (rollouts|tokens|traces)(/|$)"
    r"|\w.* (\.engines\.json\.partial|engines\.json|alarms\.jsonl|solve_rates\.jsonl)$"
    r"|sync dump/step_N\.unfinished/|remove (checkpoints|dump/step_N\.unfinished)"
    r"|read checkpoints/step-N/checkpoint\.json"
)
"""What a run goes on without, with a warning: what people read beside the metrics, room on the disk, an older
checkpoint, and that finished rollouts outlive a lost machine."""
WARNED = re.compile(
    r"tensorboard|could not be deleted|skipped: |perhaps not on the disk|is not in alarms\.jsonl"
    r"|(sample rollouts|token records|trace|solve rates|states of the engines) .* (are|is) not written"
)
FIX = re.compile(r"Make room|make room|make it writable|bring it back|look at the file system")


class Case:
    """Holds what all runs of this file share."""

    def __init__(self, url: str, model: Path, workers: Tasks) -> None:
        self.url, self.model, self.workers = url, model, workers

    def config(self, folder: Path, steps: int) -> Config:
        return toy_config(
            folder,
            self.model,
            self.url,
            steps,
            evaluation={"prompts": 0},
            checkpoint={"every_steps": 1, "keep": 1, "keep_best_metric": None},
        )

    def run(self, folder: Path, resume: bool = False, steps: int = STEPS) -> torch.Tensor:
        return run_toy(self.config(folder, steps), resume=resume, workers=self.workers).table.detach()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    model = toy_model(tmp_path_factory.mktemp("model"))
    with running_engine() as (url, _):
        config = toy_config(tmp_path_factory.mktemp("workers"), model, url, STEPS)
        hf_config = json.loads((model / "config.json").read_text())
        with start_tasks(config, hf_config, ToyLayout()) as workers:
            yield Case(url, model, workers)


@pytest.fixture(scope="module")
def reference(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Faults]:
    """Return the result of a run without faults, and everything that it did to its folder."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with injected(Faults(folder)) as faults:
        return case.run(folder), faults


def torn(folder: Path) -> list[str]:
    """Return what is not whole although it has its final name."""
    found = []
    for path in folder.glob("rollouts/step_*.jsonl"):
        if not all(json.loads(line) for line in path.read_text().splitlines()) or not path.stat().st_size:
            found.append(path.name)
    for path in folder.glob("dump/step_*.npz"):
        with np.load(path) as file:
            _ = [file[name] for name in file.files]
    for step in complete_steps(folder / "checkpoints"):
        damage = damaged_files(step, describe(step))
        found += [damage] if damage else []
    found += [str(path) for path in folder.glob("checkpoints/step-*") if path not in complete_steps(path.parent)]
    read_records(folder / "metrics.jsonl")
    return found


def problem(
    case: Case, folder: Path, wanted: torch.Tensor, site: Site, error: int, after: int, warnings: Callable[[], str]
) -> str | None:
    """Return what went wrong when a fault was injected into a run, if anything."""
    said: Exception | None = None
    warnings()
    with injected(Faults(folder, site, error, after)) as faults:
        try:
            case.run(folder)
        except Exception as raised:
            said = raised
    if not faults.hits:
        return "the fault never came up"
    warned = warnings()
    if EITHER.match(" ".join(site)):
        if said is None and not re.search("WARNING|lock .* (renewed|released)", warned) and site.path != "lock/N":
            return "the run went on without a word"
    elif GOES_ON.match(" ".join(site)):
        if said is not None:
            return f"the run stopped: {said!r}"
        if not WARNED.search(warned):
            return "the run went on without a word"
    elif said is None:
        return "the run went on"
    text = str(said)
    locked = isinstance(said, RunLocked) and "try again later" in text
    if said is not None and not locked and not all((str(folder) in text, os.strerror(error) in text, FIX.search(text))):
        return f"the message does not name file, cause and fix: {said!r}"
    if site.path.startswith("lock/") and said is not None:
        return None  # this process lives on and holds the lock; the run of another process is not refused
    if broken := torn(folder):
        return f"not whole: {broken}"
    try:
        if not torch.equal(case.run(folder, resume=True), wanted):
            return "a resumed run ended with other weights"
    except Exception as raised:
        return f"it cannot be resumed: {raised!r}"
    steps = [record["step"] for record in read_records(folder / "metrics.jsonl") if record["kind"] == "train"]
    return None if steps == list(range(STEPS)) else f"metrics.jsonl has the steps {steps}"


@pytest.fixture
def warnings(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return a function that returns, once, what was said since its last call."""

    def said() -> str:
        text = capsys.readouterr().err + caplog.text
        caplog.clear()
        return text

    return said


@pytest.mark.parametrize("site", IMPORTANT, ids=" ".join)
def test_what_a_run_writes_may_fail(case, reference, tmp_path, warnings, site):
    """The sites are one of each kind of file; the next test has all of them."""
    wanted, faults = reference
    wrong = problem(case, tmp_path / "run", wanted, site, ERRORS[site.operation][0], faults.seen[site] // 2, warnings)
    assert not wrong, wrong


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_write_may_fail(case, reference, tmp_path, warnings):
    """Every site fails with every error, at its first, a middle and its last time."""
    wanted, faults = reference
    found: dict[str, str] = {}
    numbers = count(1)
    for site, times in sorted(faults.seen.items()):
        for error in ERRORS[site.operation]:
            for after in sorted({0, times // 2, times - 1}):
                folder = tmp_path / str(next(numbers))
                wrong = problem(case, folder, wanted, site, error, after, warnings)
                shutil.rmtree(folder, ignore_errors=True)
                if wrong:
                    found[f"{' '.join(site)}, {os.strerror(error)}, after {after} of {times}"] = wrong
    assert not found, "\n".join(f"{place}: {wrong}" for place, wrong in found.items())
