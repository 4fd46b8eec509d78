"""A wall clock that jumps by a day changes nothing in a run: waits, times and order follow other clocks."""

import itertools
import threading
import time

import pytest
import torch

from fiberpo_megatron.mcore.checkpoint.folders import complete_steps, step_of
from fiberpo_megatron.telemetry.sinks import read_records
from tests.faults.test_writes import STEPS, Case, case, reference  # noqa: F401 - fixtures

DAY_S = 86_400.0


class JumpingClock:
    """Is a day wrong in one direction or the other, another one at every look."""

    def __init__(self) -> None:
        self._real, self._jumps, self._lock = time.time, itertools.cycle((DAY_S, -DAY_S, 0.0)), threading.Lock()
        self.looks = 0

    def __call__(self) -> float:
        with self._lock:
            self.looks += 1
            return self._real() + next(self._jumps)


@pytest.mark.parametrize("resumed", [False, True], ids=["straight", "resumed"])
def test_a_jumping_clock_changes_nothing(case: Case, reference, tmp_path, monkeypatch, resumed):  # noqa: F811
    clock = JumpingClock()
    monkeypatch.setattr(time, "time", clock)
    folder = tmp_path / "run"
    if resumed:
        case.run(folder, steps=STEPS - 1)
    table = case.run(folder, resume=resumed)
    assert clock.looks, "nothing looks at the clock: the test shows nothing"
    assert torch.equal(table, reference[0])
    records = read_records(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS))
    seconds = [value for record in records for name, value in record.items() if name.startswith("seconds/")]
    assert len(seconds) > 10 * STEPS and all(0 <= value < 600 for value in seconds)
    assert [step_of(path) for path in complete_steps(folder / "checkpoints")] == [STEPS]
