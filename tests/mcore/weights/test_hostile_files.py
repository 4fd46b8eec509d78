"""Model folders that somebody made to do harm: one clear error, no file outside the folder, no memory without bound."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fiberpo_megatron.mcore.weights.files import INDEX_NAME, SINGLE_NAME, HfFiles, stored_tensors, tensor_shapes
from fiberpo_megatron.mcore.weights.save import save_hf
from fiberpo_megatron.printable import printable
from fiberpo_megatron.weight_sync.manifest import folder_shapes
from tests.mcore.weights.test_files import MODEL, TABLE, source_folder


def opened(folder: Path) -> HfFiles:
    return HfFiles(folder, TABLE, MODEL)


def refusal(folder: Path) -> str:
    """The same sentence from everything that reads a folder's headers: also from the checks before a run."""
    with pytest.raises(ValueError) as caught:
        opened(folder)
    said = str(caught.value)
    for read in (stored_tensors, tensor_shapes):
        if any(folder.glob("*.safetensors")):
            with pytest.raises(ValueError) as again:
                read(folder)
            assert str(again.value) == said
    assert printable(said) == said and len(said) < 1500
    return said


ELSEWHERE = ["../outside.safetensors", "{root}/outside.safetensors", "sub/inner.safetensors", "sub/../a.safetensors"]
NO_FILES = [
    "..",
    ".",
    "",
    "a",
    "a.bin",
    ".hidden.safetensors",
    "a\\b.safetensors",
    "a\nb.safetensors",
    "\x1b[2J.safetensors",
]


@pytest.mark.parametrize("place", [*ELSEWHERE, *NO_FILES, 3, None, ["a.safetensors"]])
def test_an_index_that_names_a_file_elsewhere(place: Any, tmp_path: Path) -> None:
    """Such a file would be read, and overwritten when the trained model is saved."""
    source = source_folder(tmp_path)
    (source / SINGLE_NAME).rename(source / "a.safetensors")
    (source / "sub").mkdir()
    outside = [tmp_path / "outside.safetensors", source / "sub" / "inner.safetensors"]
    for path in outside:
        save_file({"w": torch.ones(2)}, path)
    before = [path.read_bytes() for path in outside]
    named = place.format(root=tmp_path) if isinstance(place, str) else place
    (source / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": named, "old": "a.safetensors"}}))
    said = refusal(source)
    assert "which is not the plain name of a .safetensors file in the same folder" in said
    with pytest.raises(RuntimeError, match="cannot write the model"):
        save_hf([("w", torch.zeros(2))], tmp_path / "out", source)
    assert [path.read_bytes() for path in outside] == before
    assert not (tmp_path / "out").exists()


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """The cache of the Hugging Face hub consists of them."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), folder.mkdir()
    for i, name in enumerate(("a.safetensors", "b.safetensors")):
        save_file({f"t{i}": torch.ones(2)}, blobs / str(i))
        (folder / name).symlink_to(f"../blobs/{i}")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"t0": "a.safetensors", "t1": "b.safetensors"}}))
    assert set(opened(folder).names) == {"t0", "t1"}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE_NAME)
    assert "is not a regular file" in refusal(tmp_path)
    (tmp_path / SINGLE_NAME).unlink()
    os.mkfifo(tmp_path / INDEX_NAME)
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"v": torch.ones(2)}, tmp_path / "b.safetensors")
    assert "holds 2 .safetensors files" in pytest.raises(FileNotFoundError, opened, tmp_path).value.args[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": NaN}}', '{"a":' * 50_000])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / SINGLE_NAME)
    (tmp_path / INDEX_NAME).write_text(text)
    assert "is not a safetensors index" in refusal(tmp_path)


def entry(begin: int, end: int, shape: list[Any], kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


TWICE = f'{{"a": {json.dumps(entry(0, 32, [8]))}, "a": {json.dumps(entry(32, 64, [8]))}}}'.encode()


def header_of(entries: Any) -> bytes:
    return entries if isinstance(entries, bytes) else json.dumps(entries).encode()


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", 0),  # no header
        (b"{}", 2**63),  # longer than any file
        (b"{}", 99_000_000),
        ({"a": entry(0, 64, [16])}, 10_000),
        (b"hello world", None),  # no JSON
        (b'{"a":' * 10_000, None),
        (b'{"\xff":1}', None),
        ({"a": entry(0, 64, [16]), "b": entry(32, 64, [8])}, None),  # they overlap
        ({"a": entry(0, 32, [8])}, None),  # a hole
        ({"a": entry(0, 2**40, [2**38])}, None),  # beyond the end
        ({"a": entry(0, 64, [2**62, 2**62])}, None),  # a product that does not fit into 64 bits
        ({"a": entry(0, 64, [-16])}, None),
        ({"a": entry(0, 64, [1.5])}, None),
        ({"a": entry(0, 64, [16], "F99")}, None),
        ({"a": entry(64, 0, [16])}, None),
        ({"__metadata__": {"x": 1}, "a": entry(0, 64, [16])}, None),
        (TWICE, None),
    ],
)  # fmt: skip
def test_headers_that_lie(header: Any, length: int | None, tmp_path: Path) -> None:
    data = header_of(header)
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(data) if length is None else length) + data + b"\0" * 64)
    tracemalloc.start()
    assert f"cannot read {tmp_path / SINGLE_NAME}" in refusal(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    with pytest.raises(ValueError, match="cannot read"):
        folder_shapes(tmp_path)


def test_names_and_shapes_that_no_model_has(tmp_path: Path) -> None:
    """They are a well-formed file; the check of names and shapes refuses them, in one readable line."""
    prefix = "model.layers.1.mlp.experts."
    entries = {
        "../x\x1b[2J": entry(0, 64, [16]),
        "lm_head.weight": entry(64, 64, [0, 2**62]),
        "model.norm.weight": entry(64, 68, [1] * 5000),
        prefix + "gate_up_proj": entry(68, 68, [10**9, 0, 4]),
    }
    data = header_of(entries)
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * 68)
    assert "gate_up_proj has shape (1000000000, 0, 4), not [3, rows, columns]" in refusal_of_stack(tmp_path)
    entries.pop(prefix + "gate_up_proj")
    data = header_of(entries)
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * 68)
    files = opened(tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(0, 4611686018427387904\)"):
        files.check("lm_head.weight", (6, 4))
    with pytest.raises(ValueError, match="has shape of 5000 dimensions"):
        files.check("model.norm.weight", (4,))


def refusal_of_stack(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        opened(folder)
    return str(caught.value)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_file_with_changed_bytes(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It is refused, or holds tensors whose bytes lie in the file."""
    folder = tmp_path_factory.mktemp("m")
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(4).bfloat16()}, folder / SINGLE_NAME)
    content = bytearray((folder / SINGLE_NAME).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not content:
            return
    (folder / SINGLE_NAME).write_bytes(bytes(content))
    try:
        files = opened(folder)
        for name in files.names:
            if len(files._places[name].shape):
                files.read(name)
    except ValueError as error:
        assert str(error).startswith("cannot read") and printable(str(error)) == str(error)


def test_further_files_never_take_the_name_of_a_stored_one(tmp_path: Path) -> None:
    """An export of an earlier run has such a name, and a tensor that does not fit into it goes to a further file."""
    source = source_folder(tmp_path)
    (source / SINGLE_NAME).unlink()
    name = "more-model-00001-of-00001.safetensors"
    save_file({"odd": torch.ones(3).bfloat16(), "old": torch.ones(1).bfloat16()}, source / name)
    (source / INDEX_NAME).write_text(json.dumps({"weight_map": {"odd": name, "old": name}}))
    save_hf([("odd", torch.ones(3)), ("wide", torch.ones(2)), ("old", torch.ones(1))], tmp_path / "out", source)
    places = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    assert places["odd"] == name != places["wide"]
    for tensor, file in places.items():
        assert tensor in load_file(tmp_path / "out" / file)
