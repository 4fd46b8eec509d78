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


def test_what_ranks_say_does_not_steer_a_terminal(tmp_path: Path):
    error(tmp_path, 1, "ValueError: \x1b[2J\x9b5m\u2028 \ud83d\nsecond line", 9)
    said = explain(tmp_path)
    assert said.splitlines()[:2] == [r"fiberpo: rank 1: ValueError: \x1b[2J\x9b5m\u2028 \ud83d", "second line"]
    (tmp_path / "errors/rank_1.json").unlink()
    (tmp_path / "srun.log").write_text("srun: error: n2: task 1: Killed\n")
    (tmp_path / "rank_1.log").write_text("a\x1b]0;title\x07b\x85c\n")
    assert r"  | a\x1b]0;title\x07b\x85c" in explain(tmp_path).splitlines()


def test_files_that_are_no_messages_are_left_out(tmp_path: Path):
    error(tmp_path, 3, "ValueError: the cause", 5)
    for number, text in enumerate(
        ("", "[1]", '{"message": 3}', '{"mess', '{"message": {"message": "x", "extraInfo": 3}}')
    ):
        (tmp_path / f"errors/rank_{10 + number}.json").write_text(text)
    (tmp_path / "errors/rank_20.json").write_bytes(b"\xff")
    (tmp_path / "errors/rank_x.json").write_text('{"message": {"message": "no rank", "extraInfo": {}}}')
    (tmp_path / "errors/rank_21.json").write_text('{"message": {"message": "y", "extraInfo": {"timestamp": "nan"}}}')
    (tmp_path / "errors/rank_22.json").mkdir()
    (tmp_path / "errors/rank_4.json").write_text('{"message": "without a time"}')
    assert [f.rank for f in failures(tmp_path)] == [4, 3]


def test_what_a_rank_prints_is_not_taken_for_what_srun_says(tmp_path: Path):
    (tmp_path / "srun.log").write_text(
        "the policy said: task 0: Killed\nsrun: error: n: tasks 0-999999999999: Killed\n"
        "srun: error: n: tasks -,5-3,,: Killed\nsrun: error: n1: task 2: Killed\n"
    )
    assert [f.rank for f in failures(tmp_path)] == [2]


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path):
    (tmp_path / "srun.log").write_text("srun: error: n1: task 2: Killed\n")
    with (tmp_path / "rank_2.log").open("wb") as log:
        log.truncate(2**40)  # a terabyte without contents
        log.seek(0, 2)
        log.write(b"\nthe end\n")
    assert "  | the end" in explain(tmp_path).splitlines()
