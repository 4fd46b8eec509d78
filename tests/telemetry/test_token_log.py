"""Records of tokens on disk: whole, replaced, pruned, and skipped where they are damaged."""

import gzip
import os

import pytest

from fiberpo_megatron.telemetry.token_log import TOKENS, read_tokens, write_tokens


def packed(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0)


RECORD = {"trajectory": 3, "tokens": {"id": [5, 6], "coefficient": [[0.25, None]]}}


def test_records_come_back_and_a_resumed_step_replaces_them(tmp_path):
    assert write_tokens(tmp_path, 12, [{"trajectory": 1}], keep=4) == tmp_path / "tokens" / "step_000012.jsonl.gz"
    path = write_tokens(tmp_path, 12, [RECORD, {"trajectory": 9, "text": "line\u2028\nbreak"}], keep=4)
    records, problems = read_tokens(path)
    assert records == [{"version": 1, **RECORD}, {"version": 1, "trajectory": 9, "text": "line\u2028\nbreak"}]
    assert problems == [] and os.listdir(path.parent) == [path.name]


def test_equal_records_make_equal_bytes(tmp_path):
    one = write_tokens(tmp_path / "a", 1, [RECORD], keep=4).read_bytes()
    assert write_tokens(tmp_path / "b", 1, [RECORD], keep=4).read_bytes() == one


def test_a_run_keeps_so_many_steps(tmp_path):
    for step in range(20):
        write_tokens(tmp_path, step, [RECORD], keep=6)
    assert [step for step, _ in TOKENS.stored(tmp_path)[0]] == [0, 8, 16, 17, 18, 19]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = write_tokens(tmp_path, 1, [RECORD], keep=6)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_tokens(tmp_path, 1, [], keep=6)
    assert os.listdir(path.parent) == [path.name] and read_tokens(path)[0] == [{"version": 1, **RECORD}]


@pytest.mark.parametrize(
    ("content", "left", "said"),
    [
        (packed(b'{"trajectory": 1, "version": 1}\n{"traj'), 1, "line 2 is no record of a trajectory"),
        (packed(b'[1]\n\n{"trajectory": 1, "version": 1}\n'), 1, "line 1 is no record of a trajectory"),
        (packed(b'{"trajectory": 1, "version": 2}\n'), 0, "line 1 has version 2 of the format"),
        (packed(b"[" * 200_000), 0, "line 1 is no record of a trajectory"),
        (b"no gzip", 0, "cannot be read to its end (BadGzipFile"),
        (packed(b'{"trajectory": 1, "version": 1}\n')[:-9], 0, "cannot be read to its end (EOFError"),
        (packed(b'{"trajectory": 1}')[:10] + b"\xff" * 40, 0, "cannot be read to its end (error"),
    ],
    ids=["half line", "list", "version", "deep", "no gzip", "cut", "garbage"],
)
def test_damaged_files_are_reported_and_the_rest_is_read(tmp_path, content, left, said):
    path = TOKENS.path(tmp_path, 7)
    path.parent.mkdir()
    path.write_bytes(content)
    records, problems = read_tokens(path)
    assert len(records) == left and len(problems) == 1
    assert problems[0].startswith("tokens/step_000007.jsonl.gz") and said in problems[0]
