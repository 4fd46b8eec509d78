"""Groups of a step that was cut short: what was finished is read, what is torn or of other weights is not."""

import logging
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fiberpo_megatron.environments import Task
from fiberpo_megatron.rollout.dump import Origin
from fiberpo_megatron.rollout.finished import FinishedGroups, origins
from fiberpo_megatron.types import (
    Branch,
    Completion,
    Prompt,
    RolloutGroup,
    Trajectory,
    WeightSpan,
    flatten,
    named_arrays,
)

ORIGIN = Origin(3, "3", "ab", {"run.seed": 7}, "cd", "ef")
PROMPTS = [Prompt(10 + i, 0, (i, 2), f"p{i}", Task(f"p{i}", "8")) for i in range(6)]


def group(index: int, routing: bool = False) -> RolloutGroup:
    plain = Completion((5, index), np.array([-0.1, -1 / 3], np.float32), "length", (WeightSpan("3", 0, 2),))
    experts = np.arange(3 * 2 * 2, dtype=np.int32).reshape(3, 2, 2) if routing else None
    turns = replace(
        plain,
        loss_mask=np.array([True, False]),
        routed_experts=experts,
        weight_spans=(WeightSpan("3", 0, 1),) * 2,
        engines=np.array([2, -1], np.int16),
    )
    prompt = PROMPTS[index]
    other = replace(prompt, token_ids=(7, 7, 7))  # the environment began with another prompt than the task's
    return RolloutGroup(
        prompt,
        (
            Trajectory(prompt, plain, "a\u00e9", 1 / 3, False),
            Trajectory(prompt, turns, "", 1.0, True, {"format": 1 / 3}, {"calls": 2.0}),
            Trajectory(other, plain, "", 0.0, False, failure="deadline: it took too long"),
        ),
    )


def opened(folder: Path, mine: Sequence[int] = range(6), rank: int = 0, wanted: Origin = ORIGIN) -> FinishedGroups:
    return FinishedGroups(folder, wanted, rank, PROMPTS, mine, lambda found: found == wanted)


def written(folder: Path, *indices: int, rank: int = 0) -> Path:
    with opened(folder, rank=rank) as groups:
        for index in indices:
            groups[index] = group(index)
    return max(folder.glob(f"rank_{rank:05d}.*"))


def assert_same(ours: RolloutGroup, theirs: RolloutGroup) -> None:
    assert ours.prompt == theirs.prompt and len(ours.trajectories) == len(theirs.trajectories)
    for a, b in zip(ours.trajectories, theirs.trajectories):
        assert replace(a, completion=None) == replace(b, completion=None)
        x, y = a.completion, b.completion
        assert (x.token_ids, x.finish_reason, x.weight_spans) == (y.token_ids, y.finish_reason, y.weight_spans)
        for name in ("log_probs", "routed_experts", "loss_mask", "engines"):
            left, right = getattr(x, name), getattr(y, name)
            assert (left is None) == (right is None)
            if left is not None:
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)


def test_what_is_written_is_read_bitwise(tmp_path: Path) -> None:
    with opened(tmp_path) as groups:
        groups[4] = group(4, routing=True)
        groups[1] = group(1)
        assert_same(groups[4], group(4, routing=True))
        again = opened(tmp_path)  # as after a kill: the file was not closed
    assert set(again) == again.left == {1, 4}
    assert_same(again[4], group(4, routing=True))
    assert_same(again[1], group(1))
    assert list(origins(tmp_path)) == [ORIGIN]


def test_a_group_whose_trajectories_were_all_dropped_is_finished(tmp_path: Path) -> None:
    with opened(tmp_path) as groups:
        groups[2] = RolloutGroup(PROMPTS[2], ())
    assert opened(tmp_path)[2] == RolloutGroup(PROMPTS[2], ())


def test_branches_are_read_bitwise(tmp_path: Path) -> None:
    def routed(trajectory: Trajectory, tokens: int) -> Completion:
        experts = np.arange((tokens - 1) * 4, dtype=np.int32).reshape(-1, 2, 2)
        return replace(trajectory.completion, routed_experts=experts)

    plain, turns, other = group(3, routing=True).trajectories
    branches = Branch((9, 8), turns.completion), Branch((3,), replace(routed(plain, 3), finish_reason="stop"))
    own = replace(plain, completion=routed(plain, 4)), replace(other, completion=routed(other, 5))
    written = RolloutGroup(PROMPTS[3], (own[0], replace(turns, branches=branches), own[1]))
    with opened(tmp_path) as groups:
        groups[3] = written
    read = opened(tmp_path)[3]
    assert [len(one.branches) for one in read.trajectories] == [0, 2, 0]
    for ours, theirs in zip(branches, read.trajectories[1].branches):
        assert ours.prompt_ids == theirs.prompt_ids and ours.completion.weight_spans == theirs.completion.weight_spans
        assert ours.completion.finish_reason == theirs.completion.finish_reason
    ours, theirs = named_arrays(flatten([written])), named_arrays(flatten([read]))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_another_layout_reads_what_is_its_own(tmp_path: Path) -> None:
    for rank, indices in enumerate(([2, 0], [5, 3])):
        written(tmp_path, *indices, rank=rank)
    shares = [opened(tmp_path, mine) for mine in (range(2), range(2, 4), range(4, 6))]
    assert [set(share) for share in shares] == [{0}, {2, 3}, {5}]
    assert all(share.left == {0, 2, 3, 5} for share in shares)


def test_a_torn_record_is_dropped_wherever_it_is_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, 0, 1)
    whole, with_one = path.read_bytes(), written(tmp_path / "one", 0).stat().st_size
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        assert set(opened(tmp_path)) == ({0} if size >= with_one else set()), size
    assert "its last record is torn and not used" in caplog.text
    assert opened(tmp_path).left == {0}


def test_a_record_that_was_lost_with_its_machine_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file has its length, but not all of its bytes."""
    path = written(tmp_path, 0, 1, 2)
    data = bytearray(path.read_bytes())
    with_one = len(written(tmp_path / "one", 0).read_bytes())
    data[with_one + 100 : with_one + 200] = bytes(100)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert set(opened(tmp_path)) == {0, 2}
    assert f"the record at byte {with_one + 24} is damaged" in caplog.text


def test_a_start_never_writes_behind_a_torn_record(tmp_path: Path) -> None:
    path = written(tmp_path, 0, 1)
    path.write_bytes(path.read_bytes()[:-3])
    written(tmp_path, 1, 2)
    assert set(opened(tmp_path)) == {0, 1, 2} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", [{"weights": "4"}, {"prompts": "xy"}, {"run": "x"}, {"format": 2}], ids=str)
def test_other_origins_are_not_used(tmp_path: Path, change: dict, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, 0, 1)
    with caplog.at_level(logging.WARNING):
        groups = opened(tmp_path, wanted=replace(ORIGIN, **change))
    assert not groups and not groups.left and "is of another configuration or other weights" in caplog.text


@pytest.mark.parametrize("described", [b"[1, 2]", b"null", b"7", b'"text"', b"{", b"\xff", b"[" * 10**5])
def test_an_origin_that_is_no_json_object_is_not_used(
    tmp_path: Path, described: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The checksum is right: the record is what its writer wrote."""
    path, other = written(tmp_path, 0), written(tmp_path, 1, rank=1)
    head = struct.Struct("<4sqQI")
    whole = path.read_bytes()
    rest = whole[head.size + head.unpack_from(whole)[2] :]
    path.write_bytes(head.pack(b"grp1", -1, len(described), zlib.crc32(described)) + described + rest)
    with caplog.at_level(logging.WARNING):
        assert set(opened(tmp_path)) == {1} and list(origins(tmp_path)) == [ORIGIN], other
    assert f"{path}: its first record does not say where the rollouts come from" in caplog.text


@pytest.mark.parametrize("payload", [b"", b"{}", b"PK\x03\x04 cut", b"\x93NUMPY"])
def test_a_record_that_is_no_group_is_not_used(
    tmp_path: Path, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as groups:
        groups[0] = group(0)
        groups._append(1, payload)
        groups[2] = group(2)
    with caplog.at_level(logging.WARNING):
        assert set(opened(tmp_path)) == {0, 2}
    assert "is no group of rollouts and not used" in caplog.text


def test_what_is_no_readable_file_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, 0)
    (tmp_path / "rank_00001.0").mkdir()
    (tmp_path / "rank_00002.0").symlink_to(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        assert set(opened(tmp_path)) == {0} and list(origins(tmp_path)) == [ORIGIN]
    assert "rank_00001.0 is not used: it cannot be read (Is a directory)" in caplog.text
    assert "rank_00002.0 is not used: it cannot be read (No such file or directory)" in caplog.text


def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    groups = opened(Path("/dev/full/nothing"))
    with pytest.raises(OSError, match=r"keeping a finished rollout.*make room, or set storage.unfinished = false"):
        groups[0] = group(0)
    assert not groups
