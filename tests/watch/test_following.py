"""A run folder is read incrementally: what was appended, half lines, files that a resumed run replaces, odd lines."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.telemetry.sinks import drop_records
from fiberpo_megatron.watch import following
from fiberpo_megatron.watch.curves import Window, curve
from fiberpo_megatron.watch.following import FollowedRun, Follower
from fiberpo_megatron.watch.table import Table
from tests.watch.serving import write_run


def line(step: int, kind: str = "train", **values: Any) -> str:
    return json.dumps({"step": step, "kind": kind} | values) + "\n"


def values(run: FollowedRun, name: str = "x", kind: str = "train") -> list[float | None]:
    found = curve(run, {"kind": kind, "metric": name}, Window())
    return [] if found is None else found["y"]


def test_what_was_appended_is_read_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    run = FollowedRun(tmp_path)
    run.read_all()
    assert run.problem == "metrics.jsonl does not exist yet" and not run.tables
    path.write_text(line(0, x=1.0) + line(1, x=2.0))
    run.read_all()
    assert values(run) == [1.0, 2.0] and run.problem == ""
    version = run.version
    run.read_all()
    assert run.version == version
    seen: list[bytes] = []
    parse = following.parse_record
    monkeypatch.setattr(following, "parse_record", lambda text: seen.append(text) or parse(text))
    with path.open("a") as file:
        file.write(line(2, x=3.0))
    run.read_all()
    assert values(run) == [1.0, 2.0, 3.0] and run.version == version + 1
    assert len(seen) == 1


def test_half_a_line_waits_for_its_rest(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    run = FollowedRun(tmp_path)
    text = line(0, x=1.0) + line(1, x=2.0)
    for end in range(0, len(text) + 1, 7):
        path.write_text(text[:end])  # also a file that was replaced by a longer one with the same beginning
        run.read_all()
        assert values(run) == [1.0, 2.0][: text[:end].count("\n")]
        assert run.odd_lines == 0
    path.write_text(text)
    run.read_all()
    assert values(run) == [1.0, 2.0]


def test_a_resumed_run_takes_its_records_back(tmp_path: Path):
    write_run(tmp_path, 10)
    run = FollowedRun(tmp_path)
    run.read_all()
    assert len(run.tables["train"]) == 10
    drop_records(tmp_path / "metrics.jsonl", 6, ("train", "eval"))
    run.read_all()
    assert run.tables["train"].steps.tolist() == list(range(6))
    write_run(tmp_path, 3, first=6)
    run.read_all()
    assert run.tables["train"].steps.tolist() == list(range(9))


def test_a_file_of_the_same_length_with_another_end_is_read_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(0, x=1.0) + line(1, x=2.0))
    run = FollowedRun(tmp_path)
    run.read_all()
    path.write_text(line(0, x=5.0) + line(1, x=6.0))
    run.read_all()
    assert values(run) == [5.0, 6.0]
    path.unlink()
    run.read_all()
    assert values(run) == []


def test_of_several_records_of_one_step_the_last_counts(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        line(0, x=1.0) + line(1, x=2.0, y=1.0) + line(2, x=3.0) + line(1, x=20.0) + line(5, x=9.0) + line(4, x=7.0)
    )
    run = FollowedRun(tmp_path)
    run.read_all()
    table = run.tables["train"]
    assert table.steps.tolist() == [0, 1, 2, 4, 5]
    assert values(run) == [1.0, 20.0, 3.0, 7.0, 9.0]
    assert table.row(1) == {"x": 20.0}  # y belonged to the earlier record
    assert table.row(3) is None


def test_odd_lines_are_counted_and_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    huge = "9" * 400
    path.write_text(
        line(0, x=1.0)
        + "no record\n\n[1]\n"
        + '{"step": -1, "kind": "train"}\n'
        + line(1, x=float("nan"), y="text", z=None)
        + f'{{"step": 2, "kind": "train", "x": {huge}, "n": [1], "b": true}}\n'
        + line(0, kind="eval", x=3.0)
    )
    run = FollowedRun(tmp_path)
    run.read_all()
    assert run.odd_lines == 3
    assert run.tables["train"].row(1) == {}
    assert run.tables["train"].row(2) == {"b": 1.0}
    assert values(run) == [1.0]  # a metric that few records have: its points are joined
    assert values(run, kind="eval") == [3.0]
    assert "y" not in run.tables["train"].names and "n" not in run.tables["train"].names


def test_a_line_without_end_is_skipped_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(following, "CHUNK", 64)
    monkeypatch.setattr(following, "LONGEST_LINE", 256)
    (tmp_path / "metrics.jsonl").write_text(line(0, x=1.0) + "z" * 3000 + "\n" + line(1, x=2.0))
    run = FollowedRun(tmp_path)
    run.read_all()
    assert values(run) == [1.0, 2.0]
    assert run.odd_lines == 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 64, 1000])
def test_chunks_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(following, "CHUNK", chunk)
    text = "".join(line(step, x=float(step), **({"y": 1.0} if step % 3 else {})) for step in range(20))
    (tmp_path / "metrics.jsonl").write_text(text)
    run = FollowedRun(tmp_path)
    run.read_all()
    assert values(run) == [float(step) for step in range(20)]
    assert run.progress.share == 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.dictionaries(st.sampled_from("abc"), st.floats(-9, 9, width=32), max_size=3)),
        max_size=30,
    ),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_a_table_is_a_dictionary_by_step(records: list[tuple[int, dict[str, float]]], cuts: list[int]):
    table, expected = Table(), {}
    for step, row in records:
        table.extend(tuple(row), [step], [list(row.values())])
        expected[step] = row
    assert table.steps.tolist() == sorted(expected)
    for step, row in expected.items():
        found = table.row(step)
        assert found == row


def test_a_table_grows_by_blocks(tmp_path: Path):
    table = Table()
    for start in range(0, 3000, 500):
        steps = range(start, start + 500)
        table.extend(("a", "b"), list(steps), [[step, -step] for step in steps])
    table.extend(("c",), [3000], [[1.0]])
    found = table.column("a")
    assert found is not None and found[:3000].tolist() == list(range(3000)) and np.isnan(found[3000])
    late = table.column("c")
    assert late is not None and np.isnan(late[:3000]).all() and late[3000] == 1.0


def test_the_follower_sees_new_records_within_its_pause(tmp_path: Path):
    write_run(tmp_path, 2)
    run = FollowedRun(tmp_path)
    follower = Follower([run], pause_s=0.05)
    follower.start()
    try:
        write_run(tmp_path, 1, first=2)
        deadline = time.monotonic() + 5
        while len(run.tables.get("train", ())) < 3:
            assert time.monotonic() < deadline, "the new record was not read within 5 s"
            time.sleep(0.01)
    finally:
        follower.close()


def test_a_folder_that_cannot_be_read_is_a_problem_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, 3)
    run = FollowedRun(tmp_path)
    run.read_all()
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(116, os.strerror(116))))
    assert run.read() is False
    assert "cannot be read" in run.problem and len(run.tables["train"]) == 3
