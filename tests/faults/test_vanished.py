"""Somebody deletes a folder of a run in the middle of it: the run makes it again, or stops and can be resumed."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fiberpo_megatron.interfaces import Recorder
from fiberpo_megatron.run_lock import RunLockLost
from fiberpo_megatron.types import RolloutGroup
from tests.faults.test_writes import FIX, STEPS, Case, case, reference, torn  # noqa: F401 - fixtures
from tests.soak.toy_run import run_toy

FURTHER = ("rollouts", "published", "tensorboard")


@dataclass
class Deleting:
    """Stands before the recorder of a run and deletes a folder when the first step is recorded."""

    recorder: Recorder
    folder: Path

    def record(self, kind: Any, step: int, metrics: Mapping[str, float]) -> None:
        self.recorder.record(kind, step, metrics)
        if step == 0:
            assert any(self.folder.iterdir()), "there is something to delete"
            shutil.rmtree(self.folder)

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], kind: Any = "train", **about: Any) -> None:
        self.recorder.rollouts(step, groups, kind, **about)

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
        self.recorder.evaluation(step, sets)

    def stopping(self) -> str | None:
        return self.recorder.stopping()


@pytest.mark.parametrize(
    "name",
    [
        "dump",
        "lock",
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("rollouts", "published", "tensorboard")),
    ],
)
def test_a_folder_that_vanishes(case: Case, reference, tmp_path: Path, name: str):  # noqa: F811
    folder = tmp_path / "run"
    config = case.config(folder, STEPS)
    try:
        run_toy(config, wrap=lambda recorder: Deleting(recorder, folder / name), workers=case.workers)
    except (OSError, RuntimeError) as error:
        assert str(folder) in str(error) and (FIX.search(str(error)) or isinstance(error, RunLockLost)), repr(error)
    assert not torn(folder)
    assert torch.equal(case.run(folder, resume=True), reference[0])
