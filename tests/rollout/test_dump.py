"""Stored rollouts: what is written is read, damage and foreign files are refused."""

import json
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo_megatron.environments import Task
from fiberpo_megatron.rollout.dump import INDEX, DumpError, Origin, RolloutDump, prompts_digest
from fiberpo_megatron.types import Prompt, RolloutBatch, named_arrays
from tests.distributed.parity import make_batch

ORIGIN = Origin(3, "3", "ab", {"run.seed": 7}, "cd")


def batch_with_everything() -> RolloutBatch:
    batch, rng = make_batch(), np.random.default_rng(0)
    count = len(batch.lengths)
    return replace(
        batch,
        routing_rows=np.arange(len(batch.tokens), dtype=np.int32),
        held_rows=np.arange(1, len(batch.tokens)),
        routed_experts=rng.integers(0, 8, (len(batch.tokens) - 1, 2, 2)).astype(np.uint8),
        weight_versions=rng.integers(-1, 9, len(batch.tokens)),
        engines=rng.integers(-1, 3, len(batch.tokens)).astype(np.int16),
        failed=rng.random(count) < 0.5,
        reward_parts={"format": rng.random(count).astype(np.float32), "a/b": np.full(count, np.nan, np.float32)},
        environment_metrics={"calls": np.arange(count, dtype=np.float32)},
    )


def test_what_is_written_is_read_bitwise(tmp_path: Path) -> None:
    dump, batch = RolloutDump(tmp_path / "dump"), batch_with_everything()
    dump.write(batch, ORIGIN)
    read = dump.read(3)
    before, after = named_arrays(batch), named_arrays(read)
    assert before.keys() == after.keys() and len(before) == len(fields(RolloutBatch)) + 1
    for name, array in before.items():
        assert array.dtype == after[name].dtype and array.shape == after[name].shape
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    assert dump.origin(3) == ORIGIN
    assert sorted(path.name for path in dump.folder.iterdir()) == [INDEX, "step_000003.npz"]


def test_index_is_readable_and_follows(tmp_path: Path) -> None:
    dump, batch = RolloutDump(tmp_path), make_batch()
    for step in (4, 3, 5, 4):
        dump.write(batch, replace(ORIGIN, step=step))
    lines = [json.loads(line) for line in (tmp_path / INDEX).read_text().splitlines()]
    assert [line["step"] for line in lines] == dump.steps() == [3, 4, 5]
    assert lines[0]["trajectories"] == 12 and lines[0]["groups"] == 4 and lines[0]["tokens"] == len(batch.tokens)
    assert lines[0]["reward_mean"] == pytest.approx(batch.rewards.mean())
    dump.drop(before=5)
    assert dump.steps() == [5] and len((tmp_path / INDEX).read_text().splitlines()) == 1


def test_missing_steps_say_what_there_is(tmp_path: Path) -> None:
    dump = RolloutDump(tmp_path)
    with pytest.raises(DumpError, match="no rollouts of step 0; it holds no rollouts; `fiberpo dump`"):
        dump.read(0)
    for step in (0, 1):
        dump.write(make_batch(), replace(ORIGIN, step=step))
    with pytest.raises(DumpError, match="no rollouts of step 2; it has 2 steps from 0 to 1; lower trainer.steps"):
        dump.read(2)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.99])
def test_flipped_bits_are_seen(tmp_path: Path, place: float) -> None:
    dump = RolloutDump(tmp_path)
    dump.write(batch_with_everything(), ORIGIN)
    data = bytearray(dump.path(3).read_bytes())
    at = int(len(data) * place)
    data[at : at + 64] = bytes(255 - byte for byte in data[at : at + 64])
    dump.path(3).write_bytes(data)
    with pytest.raises(DumpError, match="step_000003.npz"):
        dump.read(3)


def test_a_cut_file_is_damaged(tmp_path: Path) -> None:
    dump = RolloutDump(tmp_path)
    dump.write(make_batch(), ORIGIN)
    dump.path(3).write_bytes(dump.path(3).read_bytes()[:1000])
    with pytest.raises(DumpError, match="step_000003.npz is damaged"):
        dump.origin(3)


def test_files_of_other_versions_are_refused(tmp_path: Path) -> None:
    dump = RolloutDump(tmp_path)
    dump.write(make_batch(), replace(ORIGIN, format=9))
    with pytest.raises(DumpError, match="has format 9; this version reads 1"):
        dump.read(3)
    dump.write(make_batch(), ORIGIN)
    with np.load(dump.path(3)) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(dump.path(3), **{k: v for k, v in arrays.items() if k != "rewards"}, colour=np.zeros(1))
    with pytest.raises(DumpError, match=r"lacks \['rewards'\] and has unknown \['colour'\]"):
        dump.read(3)


def test_files_without_what_was_added_later_are_read(tmp_path: Path) -> None:
    """Those of the first version know neither engines nor versions of weights by token, nor failures or rewards."""
    dump, batch = RolloutDump(tmp_path), batch_with_everything()
    dump.write(batch, ORIGIN)
    added = ("weight_versions", "engines", "failed", "reward_parts", "environment_metrics")
    added += ("routing_rows", "held_rows", "routed_experts")
    with np.load(dump.path(3)) as file:
        arrays = {name: file[name] for name in file.files if name.partition("/")[0] not in added}
    np.savez(dump.path(3), **arrays)
    read = dump.read(3)
    np.testing.assert_array_equal(read.tokens, batch.tokens)
    assert (read.weight_versions == -1).all() and (read.engines == -1).all() and not read.failed.any()
    assert read.reward_parts == read.environment_metrics == {} and read.routed_experts.shape == (0, 0, 0)


def test_leaders_write_their_routes_and_any_number_of_them_reads_all(tmp_path: Path) -> None:
    dump, batch = RolloutDump(tmp_path), batch_with_everything()
    for leader, rows in enumerate((slice(0, 20), slice(20, 50), slice(50, None))):
        held = {"held_rows": batch.held_rows[rows], "routed_experts": batch.routed_experts[rows]}
        dump.write_routes(replace(batch, **held), ORIGIN, leader)
    dump.write(batch, ORIGIN, routes=3)
    read = dump.read(3)
    assert not len(read.held_rows) and np.array_equal(read.routing_rows, batch.routing_rows)
    for leaders in (1, 2, 3):
        parts = [dump.read_routes(3, leader, leaders) for leader in range(leaders)]
        rows = np.concatenate([part["held_rows"] for part in parts])
        experts = np.concatenate([part["routed_experts"] for part in parts])
        order = rows.argsort()
        assert np.array_equal(rows[order], batch.held_rows) and np.array_equal(experts[order], batch.routed_experts)
    assert dump.read_routes(3, 3, 4) == {}
    dump.write_routes(batch, replace(ORIGIN, run="other"), 1)
    with pytest.raises(DumpError, match=r"routes-00001\.npz is of other rollouts"):
        dump.read_routes(3, 0, 1)
    (tmp_path / "step_000003.routes-00001.npz").unlink()
    with pytest.raises(DumpError, match=r"no rollouts of step 3 \(routes-00001 is missing\)"):
        dump.read_routes(3, 0, 1)
    dump.drop(before=4)
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def test_routes_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They stood in the step's own file, for all tokens, in two bytes and with -1 where an engine gave none."""
    dump, batch = RolloutDump(tmp_path), make_batch()
    dump.write(batch, ORIGIN)
    experts = np.random.default_rng(0).integers(0, 8, (len(batch.tokens), 2, 2)).astype(np.int16)
    experts[[3, 7]] = -1
    with np.load(dump.path(3)) as file:
        arrays = {name: file[name] for name in file.files if name not in ("routing_rows", "held_rows")}
    np.savez(dump.path(3), **arrays | {"routed_experts": experts})
    read = dump.read(3)
    assert read.routed_experts.dtype == np.uint8 and len(read.routing_rows) == len(batch.tokens)
    assert set(range(len(batch.tokens))) - set(read.held_rows.tolist()) == {3, 7}
    assert np.array_equal(read.routed_experts, experts[read.held_rows])


NAMES = ("", "\x00", "a\x00b", "a\x00c", "\ud83d", "x", "x.npy", "../x", "/etc/passwd", "\u202e\x1b[2J", "é" * 40_000)
"""Names that an environment may choose for its numbers, and that no member of a zip file can have."""


def test_numbers_of_environments_may_have_any_name(tmp_path: Path) -> None:
    dump, plain = RolloutDump(tmp_path), make_batch()
    parts = {name: np.full(len(plain.lengths), i, np.float32) for i, name in enumerate(NAMES)}
    dump.write(replace(plain, reward_parts=parts, environment_metrics={"\ud83d": parts["x"]}), ORIGIN)
    read = dump.read(3)
    assert {name: values[0] for name, values in read.reward_parts.items()} == {n: i for i, n in enumerate(NAMES)}
    assert list(read.environment_metrics) == ["\ud83d"]


def test_files_with_plain_names_of_numbers_are_read(tmp_path: Path) -> None:
    """Earlier versions stored the names themselves."""
    dump, batch = RolloutDump(tmp_path), batch_with_everything()
    dump.write(batch, ORIGIN)
    with np.load(dump.path(3)) as file:
        origin = file["origin"]
    np.savez(dump.path(3), origin=origin, **named_arrays(batch))
    np.testing.assert_array_equal(dump.read(3).reward_parts["format"], batch.reward_parts["format"])
    assert dump.read(3).reward_parts.keys() == {"format", "a/b"}


def test_odd_lines_of_the_index_end_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dump, odd = (
        RolloutDump(tmp_path),
        ["oops", "[1]", "{}", '{"step": "x"}', '{"step": true}', "\x1b[2J\x85", "[" * 10**5],
    )
    dump.write(make_batch(), ORIGIN)
    with (tmp_path / INDEX).open("ab") as file:
        file.write(b"\xff\n" + "\n".join(odd).encode() + b'\n\n{"step": 4, "tor')
    dump.write(make_batch(), replace(ORIGIN, step=5))
    assert [json.loads(line)["step"] for line in (tmp_path / INDEX).read_text().splitlines()] == [3, 5]
    assert caplog.text.count("a line that describes no step is left out") == 9 and "\x1b" not in caplog.text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_change_of_bytes_does_anything_but_be_refused(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        dump = RolloutDump(Path(folder))
        dump.write(batch_with_everything(), ORIGIN)
        whole = bytearray(dump.path(3).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        dump.path(3).write_bytes(whole[: data.draw(st.integers(1, len(whole)))])
        try:
            read = dump.read(3)
        except DumpError:
            return
        before, after = named_arrays(batch_with_everything()), named_arrays(read)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99)], ids=["encrypted", "compressed in an unknown way"])
def test_heads_of_members_that_zipfile_does_not_understand_are_damage(tmp_path: Path, place: int, value: int) -> None:
    dump = RolloutDump(tmp_path)
    dump.write(make_batch(), ORIGIN)
    data = bytearray(dump.path(3).read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + place] = value
    dump.path(3).write_bytes(data)
    with pytest.raises(DumpError, match=r"step_000003\.npz is damaged"):
        dump.read(3)


def test_an_origin_that_is_no_object_is_damage(tmp_path: Path) -> None:
    dump = RolloutDump(tmp_path)
    dump.write(make_batch(), ORIGIN)
    np.savez(dump.path(3), origin=np.frombuffer(b"[1]", np.uint8), **named_arrays(make_batch()))
    with pytest.raises(DumpError, match=r"is damaged \(ValueError: its origin is \[1\] and no JSON object"):
        dump.origin(3)


def test_digest_depends_on_tokens_places_and_order() -> None:
    first, second = Prompt(0, 0, (1, 2), "a", Task("a", id="0")), Prompt(1, 0, (3,), "c", Task("c", id="1"))
    digests = [
        prompts_digest(prompts)
        for prompts in ([first, second], [second, first], [first], [first, replace(second, token_ids=(4,))])
    ]
    assert len(set(digests)) == 4
    assert digests[0] == prompts_digest([replace(first, text="other"), second])
    assert digests[0] == "29961d06764840ec", "dumps of earlier versions are replayed"
    assert digests[0] != prompts_digest([replace(first, task=Task("a", id="7")), second])
