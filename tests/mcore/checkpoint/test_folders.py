"""Which checkpoints count: names, completeness, the newest, pruning."""

import json
import logging
import os
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron import durable
from fiberpo_megatron.mcore.checkpoint.folders import (
    DESCRIPTION,
    CheckpointError,
    DamagedCheckpoint,
    Description,
    FileMark,
    best,
    damaged_files,
    describe,
    latest,
    mark_all,
    partial_folder,
    prune,
    step_folder,
    step_of,
)
from fiberpo_megatron.printable import printable


def write(root: Path, step: int, **metrics: float) -> Path:
    """A complete checkpoint of two small files."""
    folder = step_folder(root, step)
    (folder / "random").mkdir(parents=True)
    (folder / "tensors.distcp").write_bytes(b"x" * 100)
    (folder / "random" / "0.pt").write_bytes(b"y" * 10)
    Description(step, {"tensor": 1}, {"layers": 2}, {}, {"seen": 3, "metrics": metrics}, mark_all(folder)).write(folder)
    return folder


def test_names() -> None:
    assert step_folder("root", 12) == Path("root/step-00000012")
    assert step_of(step_folder("root", 123456789)) == 123456789
    assert step_of(partial_folder(step_folder("root", 12))) is None
    assert partial_folder(step_folder("root", 12)).parent == Path("root")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    description = describe(write(tmp_path, 7))
    assert description.step == 7
    assert description.state == {"seen": 3, "metrics": {}}
    assert description.files == {
        "tensors.distcp": FileMark(100, zlib.crc32(b"x" * 100)),
        "random/0.pt": FileMark(10, zlib.crc32(b"y" * 10)),
    }


def test_a_flipped_bit_is_seen_by_the_rank_that_reads_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    description = describe(folder)
    assert [damaged_files(folder, description, part=rank, parts=2) for rank in (0, 1)] == [None, None]
    (folder / "random" / "0.pt").write_bytes(b"y" * 9 + b"x")
    assert describe(folder) == description  # of the same size
    assert damaged_files(folder, description, part=0, parts=2) is None
    said = damaged_files(folder, description, part=1, parts=2)
    assert said == damaged_files(folder, description)
    assert said and "random/0.pt has another checksum than when it was written" in said


def test_the_newest_complete_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest(tmp_path / "nothing") is None
    assert latest(tmp_path) is None
    for step in (2, 10, 9):
        write(tmp_path, step)
    (tmp_path / "step-notes.txt").write_text("")
    assert latest(tmp_path) == step_folder(tmp_path, 10)
    (step_folder(tmp_path, 10) / "tensors.distcp").write_bytes(b"x" * 99)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == step_folder(tmp_path, 9)
    assert "tensors.distcp has 99 bytes, 100 bytes were written" in caplog.text
    (step_folder(tmp_path, 9) / DESCRIPTION).unlink()
    assert latest(tmp_path) == step_folder(tmp_path, 2)
    step_folder(tmp_path, 11).mkdir()
    partial_folder(step_folder(tmp_path, 12)).mkdir()
    assert latest(tmp_path) == step_folder(tmp_path, 2)


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at .*step-00000003; .* holds no complete one"):
        describe(step_folder(tmp_path, 3))
    folder = write(tmp_path, 3)
    with pytest.raises(CheckpointError, match="the newest complete one beside it is .*step-00000003"):
        describe(step_folder(tmp_path, 4))
    (folder / "random" / "0.pt").unlink()
    with pytest.raises(CheckpointError, match="0.pt is missing, 10 bytes were written; take an earlier"):
        describe(folder)
    (folder / DESCRIPTION).write_text("{")
    with pytest.raises(CheckpointError, match="checkpoint.json is damaged"):
        describe(folder)
    (folder / DESCRIPTION).write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="has checkpoint format 99; this version reads 2"):
        describe(folder)
    (folder / DESCRIPTION).unlink()
    with pytest.raises(CheckpointError, match="is not a complete checkpoint: it has no checkpoint.json"):
        describe(folder)


def test_prune(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (step_folder(tmp_path, 4) / "tensors.distcp").unlink()  # damaged: neither counted nor deleted
    partial_folder(step_folder(tmp_path, 5)).mkdir()
    assert prune(tmp_path, keep=2) == [step_folder(tmp_path, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{i}" for i in (2, 3, 4)]
    assert prune(tmp_path, keep=0) == [step_folder(tmp_path, 2)]
    assert latest(tmp_path) == step_folder(tmp_path, 3)
    assert prune(tmp_path / "nothing", keep=1) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"files": []},
        {"files": {"tensors.distcp": [100]}},
        {"files": {"tensors.distcp": [100, "x"]}},
        {"files": {"tensors.distcp": [True, 1]}},
        {"files": {"tensors.distcp": [-1, 1]}},
        {"files": {"../step-00000002/checkpoint.json": [1, 1]}},
        {"files": {"/etc/passwd": [1, 1]}},
        {"files": {"\x1b[2J": [1, 1]}},
        {"state": 3},
        {"model": None},
        {"layout": []},
        {"unknown": 1},
        {"format": [2]},
        {"format": "\x1b[2J"},
    ],
)
def test_a_description_that_no_save_writes(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    read = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(read | fields))
    with pytest.raises(DamagedCheckpoint, match=r"step-00000001.* (is damaged|has checkpoint format)") as caught:
        describe(folder)
    assert printable(str(caught.value)) == str(caught.value)
    assert latest(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":' * 50_000, '{"format": 2, "format": 2}', "9" * 5000])
def test_a_description_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint\.json is damaged"):
        describe(folder)


def test_a_file_that_no_save_makes(tmp_path: Path) -> None:
    """A link could lead out of the folder, and reading a pipe would not end."""
    link, up = partial(Path.symlink_to, target="/etc/passwd"), partial(Path.symlink_to, target="..")
    for step, make in enumerate((link, up, os.mkfifo)):
        folder = write(tmp_path, step)
        make(folder / "random" / "planted")
        with pytest.raises(DamagedCheckpoint, match="random/planted is a symbolic link or another special file"):
            describe(folder)


def test_a_metric_that_is_not_a_number(tmp_path: Path) -> None:
    """It neither makes the checkpoint unreadable nor the best one."""
    write(tmp_path, 1, **{"eval/accuracy": 0.5})
    write(tmp_path, 2, **{"eval/accuracy": float("nan")})
    assert best(tmp_path, "eval/accuracy", "max") == step_folder(tmp_path, 1)


def test_a_renamed_folder_is_synced_before_anything_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that is lost could bring back the name, with half of the files."""
    done: list[str] = []
    sync, rmtree = durable.sync, shutil.rmtree
    monkeypatch.setattr(durable, "sync", lambda path: (done.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (done.append(f"delete {path.name}"), rmtree(path, True)))
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        write(root, step)
    done.clear()
    prune(root, keep=1)
    assert done[-2:] == ["sync checkpoints", "delete .step-00000001.partial"]


def test_the_best_is_kept(tmp_path: Path) -> None:
    assert best(tmp_path, "eval/accuracy", "max") is None
    for step, accuracy in enumerate((0.2, 0.9, 0.9, 0.1)):
        write(tmp_path, step, **{"eval/accuracy": accuracy})
    write(tmp_path, 4)  # no evaluation was due
    assert best(tmp_path, "eval/accuracy", "max") == step_folder(tmp_path, 2)
    assert best(tmp_path, "eval/accuracy", "min") == step_folder(tmp_path, 3)
    assert best(tmp_path, "train/loss", "min") is None
    assert prune(tmp_path, keep=1, spare=[step_folder(tmp_path, 2)]) == [step_folder(tmp_path, i) for i in (0, 1, 3)]
    assert best(tmp_path, "eval/accuracy", "max") == step_folder(tmp_path, 2)
