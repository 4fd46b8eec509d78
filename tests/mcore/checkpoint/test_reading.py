"""Nothing in the files of a checkpoint runs, whatever is in them; without a model and without ranks."""

import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fiberpo_megatron.mcore.checkpoint.folders import CheckpointError, mark_all
from fiberpo_megatron.mcore.checkpoint.metadata import read_metadata
from fiberpo_megatron.mcore.checkpoint.reading import load_plain, read_contents

COMMON = {"optimizer": {0: {"param_groups": [{"betas": (0.9, 0.95), "step": 0.0}]}}, "scheduler": {"num_steps": 3}}
RAN: list[str] = []


def run(text: str = "ran") -> str:
    """What a planted file would have called."""
    RAN.append(text)
    return text


class Payload:
    """An object whose pickle calls `run`."""

    def __reduce__(self) -> Any:
        return run, ()


@pytest.fixture(autouse=True)
def nothing_runs():
    RAN.clear()
    yield
    assert not RAN


def described(**changes: Any) -> Metadata:
    """A description of one matrix in two parts and of an object, as torch makes it."""
    parts = [ChunkStorageMetadata(torch.Size([2 * i, 0]), torch.Size([2, 3])) for i in range(2)]
    fields: dict[str, Any] = {
        "state_dict_metadata": {
            "w": TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([4, 3]), parts),
            "random_state/shard_0_1": BytesStorageMetadata(),
        },
        "storage_data": {
            MetadataIndex("w", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 40),
            MetadataIndex("w", torch.Size([2, 0]), 1): _StorageInfo("__0_0.distcp", 40, 40),
            MetadataIndex("random_state/shard_0_1"): _StorageInfo("__0_0.distcp", 80, 20),
        },
        "storage_meta": StorageMeta(checkpoint_id=PosixPath("/somewhere")),
        "version": "1.0.0",
    }
    return Metadata(**fields | changes)


def checkpoint(folder: Path, metadata: bytes | None = None, common: bytes | None = None) -> Path:
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(described()) if metadata is None else metadata)
    (folder / "common.pt").write_bytes(saved(COMMON) if common is None else common)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "__0_0.distcp").write_bytes(b"x" * 100)
    return folder


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def plain(data: bytes) -> Any:
    return load_plain(io.BytesIO(data), len(data), "the item")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_contents(folder, mark_all(folder))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    contents = read_contents(folder, mark_all(folder))
    assert contents.common == COMMON
    assert contents.metadata.state_dict_metadata == described().state_dict_metadata
    assert contents.metadata.storage_data == described().storage_data


def test_a_planted_call_in_the_description(tmp_path: Path) -> None:
    """In the place of the description and at every depth of it."""
    deep = [
        {"state_dict_metadata": {"w": Payload()}},
        {"storage_data": {MetadataIndex("w"): Payload()}},
        {"storage_data": {MetadataIndex("w"): _StorageInfo(Payload(), 0, 40)}},  # type: ignore[arg-type]
        {"storage_meta": StorageMeta(checkpoint_id=Payload())},  # type: ignore[arg-type]
        {"planner_data": Payload()},
        {"version": Payload()},
    ]
    for i, planted in enumerate([Payload(), *(described(**changes) for changes in deep)]):
        said = refusal(checkpoint(tmp_path / str(i), pickle.dumps(planted)))
        assert "it names tests.mcore.checkpoint.test_reading.run" in said and "made to run code" in said
    for protocol in range(4):  # torch writes protocol 4; the older ones name functions by another opcode
        assert "opcode" in refusal(checkpoint(tmp_path / f"p{protocol}", pickle.dumps(Payload(), protocol)))


def test_names_of_torch_that_are_no_part_of_a_description(tmp_path: Path) -> None:
    for i, name in enumerate(("load", "hub", "save", "Tensor", "compile", "float32.__class__")):
        planted = b"\x80\x04\x8c\x05torch" + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93)R."
        assert f"it names torch.{name}" in refusal(checkpoint(tmp_path / str(i), planted))
    known = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
    assert "gives a state to something else" in refusal(checkpoint(tmp_path / "a", known + b"}b."))
    assert "calls something else" in refusal(checkpoint(tmp_path / "b", known + b")R."))
    assert "a Metadata is missing" in refusal(checkpoint(tmp_path / "c", known + b"."))
    assert "keys that are neither" in refusal(
        checkpoint(tmp_path / "d", b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"Ns.")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"storage_data": {MetadataIndex("w"): _StorageInfo("../../secret", 0, 1)}}, "refers to '../../secret'"),
        ({"storage_data": {MetadataIndex("w"): _StorageInfo("/etc/passwd", 0, 1)}}, "refers to '/etc/passwd'"),
        ({"storage_data": {MetadataIndex("w"): _StorageInfo("gone.distcp", 0, 1)}}, "not a file of the checkpoint"),
        ({"storage_data": {MetadataIndex("w"): _StorageInfo("__0_0.distcp", 90, 11)}}, "byte 101 of __0_0.distcp"),
        ({"storage_data": {MetadataIndex("w"): _StorageInfo("__0_0.distcp", -1, 5)}}, "not a whole number"),
        ({"storage_data": {MetadataIndex("w"): _StorageInfo("__0_0.distcp", 0, 2**80)}}, "not a whole number"),
        ({"storage_data": {MetadataIndex("w"): _StorageInfo("__0_0.distcp", 0, 5, ["zstd"])}}, "were transformed"),
        ({"storage_data": {"w": _StorageInfo("__0_0.distcp", 0, 5)}}, "a MetadataIndex is missing"),
        ({"storage_data": None}, "a table is missing"),
        ({"state_dict_metadata": {"w": 3}}, "a TensorStorageMetadata is missing"),
        (
            {
                "state_dict_metadata": {
                    "w": TensorStorageMetadata(
                        TensorProperties(),
                        torch.Size([4]),
                        [ChunkStorageMetadata(torch.Size([3]), torch.Size([2**62]))],
                    )
                }
            },
            "lies outside the tensor",
        ),
    ],
)
def test_a_description_that_cannot_be(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(checkpoint(tmp_path / "c", pickle.dumps(described(**change))))


def test_a_description_that_declares_huge_sizes_takes_no_memory(tmp_path: Path) -> None:
    """Opcodes with which an ordinary unpickler sets memory aside before it sees that the file has ended."""
    huge = [
        b"\x80\x04N\x8e" + struct.pack("<Q", 2**40),  # BINBYTES8
        b"\x80\x04N\x96" + struct.pack("<Q", 2**40),  # BYTEARRAY8
        b"\x80\x04Nr\xff\xff\xff\xff.",  # LONG_BINPUT: a table of 2^33 entries
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",  # FRAME
        b"\x80\x04X\xff\xff\xff\xff",  # BINUNICODE
        b"\x80\x04\x8b\xff\xff\xff\x7f1",  # LONG4
    ]
    tracemalloc.start()
    for i, data in enumerate(huge):
        refusal(checkpoint(tmp_path / str(i), data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    sparse = checkpoint(tmp_path / "sparse")
    os.truncate(sparse / ".metadata", 2**40)  # a terabyte that takes no room on the disk
    with pytest.raises(CheckpointError, match="it has 1099511627776 bytes, at most"):
        read_metadata(sparse, {})


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_description_with_changed_bytes(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It is refused or says something else about the same files; nothing else can come of it."""
    whole = bytearray(pickle.dumps(described()))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            whole[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del whole[at : at + data.draw(st.integers(1, 20))]
        else:
            whole[at:at] = data.draw(st.binary(max_size=12))
        if not whole:
            return
    folder = checkpoint(tmp_path_factory.mktemp("c") / "c", bytes(whole))
    try:
        contents = read_contents(folder, mark_all(folder))
    except CheckpointError:
        return
    for place in contents.metadata.storage_data.values():
        assert place.relative_path in ("__0_0.distcp", "common.pt", "metadata.json", ".metadata")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_checkpoint(noise: bytes) -> None:
    with pytest.raises(CheckpointError):
        plain(noise)


def test_generators_are_read(tmp_path: Path) -> None:
    """What a checkpoint of ours has beside tensors: the states of all random generators."""
    state = [
        {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "tracker": OrderedDict(a=torch.get_rng_state()),
        }
    ]
    (read,) = plain(saved(state))
    random.setstate(read["python"])
    np.random.set_state(read["numpy"])
    assert np.array_equal(read["numpy"]["state"]["key"], state[0]["numpy"]["state"]["key"])  # type: ignore[index]
    assert plain(saved([None])) == [None]


PLANTED: list[Callable[[], Any]] = [
    Payload,
    lambda: [Payload()],
    lambda: {"scheduler": {"num_steps": Payload()}},
    lambda: [{"python": (3, (1, 2), Payload())}],
    lambda: np.array([Payload()], dtype=object),
    lambda: torch.nn.Linear(2, 2),
    lambda: os.path.join,
]


@pytest.mark.parametrize("planted", range(len(PLANTED)))
def test_a_planted_object(planted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PLANTED[planted]())
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # an environment that others set up changes nothing
    said = "Can only build" if planted == 4 else "which only code could rebuild"
    with pytest.raises(CheckpointError, match=f"is not data that a checkpoint holds: .*{said}"):
        plain(data)
    assert said in refusal(checkpoint(tmp_path / "c", common=data))
    if planted < 4:
        with pytest.raises(CheckpointError, match="is not in torch's format"):
            plain(pickle.dumps(PLANTED[planted]()))


def rewritten(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with other contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def test_archives_that_lie(tmp_path: Path) -> None:
    whole = saved(torch.zeros(10, dtype=torch.uint8))
    assert torch.equal(plain(rewritten(whole, lambda _, data: data)), torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="is compressed, which torch does not do"):
        plain(rewritten(saved(torch.zeros(10**6)), lambda _, data: data, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="record size"):  # a tensor larger than what is stored of it
        longer = struct.pack("<i", 2**31 - 1)
        plain(rewritten(whole, lambda name, data: data.replace(b"K\n", b"J" + longer) if "pkl" in name else data))
    member = whole.rindex(b"PK\x01\x02")
    lying = whole[: member + 20] + struct.pack("<II", 2**31, 2**31) + whole[member + 28 :]  # sizes in the directory
    with pytest.raises(CheckpointError, match="declares more bytes than it has"):
        plain(lying)
    for cut in (1, 30, len(whole) // 2, len(whole) - 1):
        with pytest.raises(CheckpointError):
            plain(whole[:cut])
    nothing = checkpoint(tmp_path / "c", common=saved([1, 2]))
    assert "holds no state" in refusal(nothing)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_file_that_is_missing(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)
