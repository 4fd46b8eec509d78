"""Which failure is named, from what torch's error handler and srun leave behind."""

import json
from pathlib import Path

import pytest

from fiberpo_megatron.launch.failures import explain, failures


def error(folder: Path, rank: int, message: str, seconds: float) -> None:
    (folder / "errors").mkdir(exist_ok=True)
    record = {"message": {"message": message, "extraInfo": {"py_callstack": "..", "timestamp": str(int(seconds))}}}
    (folder / f"errors/rank_{rank}.json").write_text(json.dumps(record))


def test_the_first_error_of_its_own_counts(tmp_path: Path):
    error(tmp_path, 0, "RuntimeError: generating rollouts failed on rank 3: EngineTimeout", 100)
    error(tmp_path, 2, "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer", 99)
    error(tmp_path, 5, "ValueError: later", 102)
    error(tmp_path, 3, "EngineTimeout: engine http://n2:1: no answer", 101)
    assert [f.rank for f in failures(tmp_path)] == [3, 5, 2, 0]
    assert explain(tmp_path).splitlines() == [
        "fiberpo: rank 3: EngineTimeout: engine http://n2:1: no answer",
        f"fiberpo: log of that rank: {tmp_path}/rank_3.log",
    ]


@pytest.mark.parametrize("how", ["Out Of Memory", "Killed", "Segmentation fault (core dumped)"])
def test_a_rank_that_was_killed_is_the_cause_of_lost_peers(tmp_path: Path, how: str):
    error(tmp_path, 0, "RuntimeError: Connection reset by peer", 99)
    (tmp_path / "srun.log").write_text(
        f"srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 7: {how}\n"
    )
    (tmp_path / "rank_7.log").write_text("step 3\nloading\n")
    said = explain(tmp_path)
    assert said.startswith("fiberpo: rank 7: ended without an error message (") and "  | loading" in said


def test_several_ranks_of_a_node(tmp_path: Path):
    (tmp_path / "srun.log").write_text("srun: error: n2: tasks 8-10,15: Terminated\n")
    assert [f.rank for f in failures(tmp_path)] == [8, 9, 10, 15]


def test_a_rank_that_never_got_as_far_as_a_message_comes_before_those_that_srun_then_killed(tmp_path: Path):
    (tmp_path / "srun.log").write_text(
        "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 2: Exited with exit code 85\n"
        "srun: error: n1: task 0: Killed\n"
    )
    (tmp_path / "rank_1.log").write_text("ModuleNotFoundError: No module named 'megatron'\n")
    assert [f.rank for f in failures(tmp_path)] == [1, 0]
    said = explain(tmp_path)
    assert said.startswith("fiberpo: rank 1: ended without") and "  | ModuleNotFoundError" in said


def test_nothing_to_be_found(tmp_path: Path):
    assert explain(tmp_path) == f"fiberpo: no rank left a message; see the logs in {tmp_path}"
