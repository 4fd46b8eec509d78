"""Reading and writing safetensors folders, without a model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiberpo_megatron.mcore.families import FAMILIES
from fiberpo_megatron.mcore.weights.files import INDEX_NAME, HfFiles
from fiberpo_megatron.mcore.weights.save import save_hf

MODEL = FAMILIES["qwen3_moe"].read_architecture(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 6,
        "hidden_size": 4,
        "intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
    }
)
TABLE = FAMILIES["qwen3_moe"].weights.for_model(MODEL)


def test_parts_of_tensors(tmp_path: Path) -> None:
    stored = {"model.norm.weight": torch.arange(4.0), "lm_head.weight": torch.arange(24.0).view(6, 4)}
    save_file(stored, tmp_path / "model.safetensors")
    files = HfFiles(tmp_path, TABLE, MODEL)
    assert set(files.names) == set(stored)
    files.check("lm_head.weight", (6, 4))
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight has shape \(6, 4\), .* needs \(4, 6\)"):
        files.check("lm_head.weight", (4, 6))
    assert torch.equal(files.read("lm_head.weight"), stored["lm_head.weight"])
    assert torch.equal(files.read("lm_head.weight", 0, 2, 4), stored["lm_head.weight"][2:4])
    assert torch.equal(files.read("lm_head.weight", 1, 1, 3), stored["lm_head.weight"][:, 1:3])
    assert files.read("lm_head.weight", 0, 6, 6).shape == (0, 4)


def test_stacked_experts_look_like_single_ones(tmp_path: Path) -> None:
    gate_up, down = torch.randn(3, 10, 4), torch.randn(3, 4, 5)
    prefix = "model.layers.1.mlp.experts."
    save_file({prefix + "gate_up_proj": gate_up, prefix + "down_proj": down}, tmp_path / "model.safetensors")
    files = HfFiles(tmp_path, TABLE, MODEL)
    assert len(list(files.names)) == 9
    for expert in range(3):
        assert torch.equal(files.read(f"{prefix}{expert}.gate_proj.weight"), gate_up[expert, :5])
        assert torch.equal(files.read(f"{prefix}{expert}.up_proj.weight", 0, 2, 4), gate_up[expert, 7:9])
        assert torch.equal(files.read(f"{prefix}{expert}.up_proj.weight", 1, 2, 4), gate_up[expert, 5:, 2:4])
        assert torch.equal(files.read(f"{prefix}{expert}.down_proj.weight"), down[expert])
    save_file({prefix + "gate_up_proj": gate_up[:2]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"gate_up_proj has shape \(2, 10, 4\), not \[3, rows, columns\]"):
        HfFiles(tmp_path, TABLE, MODEL)


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds 0 .safetensors files"):
        HfFiles(tmp_path, TABLE, MODEL)
    save_file({"lm_head.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors .*download it again"):
        HfFiles(tmp_path, TABLE, MODEL)
    (tmp_path / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"lm_head.weight": torch.zeros(6, 4)}, tmp_path / first)
    places = {"lm_head.weight": first, "model.norm.weight": second}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=rf"cannot read .*{second}"):
        HfFiles(tmp_path, TABLE, MODEL)
    for broken in ("{}", "[]", '{"weight_map": null}', "{"):
        (tmp_path / INDEX_NAME).write_text(broken)
        with pytest.raises(ValueError, match="is not a safetensors index"):
            HfFiles(tmp_path, TABLE, MODEL)


def test_an_index_that_does_not_say_what_the_files_hold(tmp_path: Path) -> None:
    """Which tensors are the model's would then depend on who reads the folder."""
    for file, name in (("a.safetensors", "lm_head.weight"), ("b.safetensors", "model.norm.weight")):
        save_file({name: torch.zeros(6)}, tmp_path / file)

    def refused(places: dict[str, str]) -> str:
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError) as caught:
            HfFiles(tmp_path, TABLE, MODEL)
        return str(caught.value)

    right = {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}
    assert f"a.safetensors does not hold model.bias, but {INDEX_NAME}" in refused(
        {**right, "model.bias": "a.safetensors"}
    )
    assert "b.safetensors holds model.norm.weight, but" in refused(
        {"lm_head.weight": "a.safetensors", "x": "b.safetensors"}
    )
    save_file({"model.norm.weight": torch.zeros(6)}, tmp_path / "model.safetensors")
    assert f"holds model.safetensors and {INDEX_NAME}" in refused(right)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_tensor_is_no_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight is stored as (F8_E4M3|I8).*convert the model to bfloat16"
    ):
        HfFiles(tmp_path, TABLE, MODEL).check("model.norm.weight", (4,))


def source_folder(root: Path) -> Path:
    source = root / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "dtype": "float32"}))
    (source / "tokenizer.json").write_text("{}")
    save_file({"old": torch.zeros(2)}, source / "model.safetensors")
    return source


def test_save_in_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(4, 8).bfloat16() for i in range(5)}  # 64 bytes each
    save_hf(tensors.items(), tmp_path / "out", source_folder(tmp_path), shard_bytes=130)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names == sorted(["config.json", "tokenizer.json", INDEX_NAME, *shards])
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], tensors[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_save_keeps_files_and_types_of_the_source(tmp_path: Path) -> None:
    source = source_folder(tmp_path)
    (source / "model.safetensors").unlink()
    stored = {"a": torch.randn(3, 2).bfloat16(), "b": torch.randn(5), "c": torch.randn(2, 2).bfloat16()}
    save_file({"c": stored["c"], "b": stored["b"]}, source / "first.safetensors")
    save_file({"a": stored["a"]}, source / "second.safetensors")
    places = {"a": "second.safetensors", "b": "first.safetensors", "c": "first.safetensors"}
    (source / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    exported = {name: tensor.float() for name, tensor in stored.items()} | {"new": torch.ones(1)}
    save_hf(exported.items(), tmp_path / "out", source)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    assert index == places | {"new": "more-model-00001-of-00001.safetensors"}
    for name, file in index.items():
        found = load_file(tmp_path / "out" / file)[name]
        assert torch.equal(found, stored.get(name, exported[name])), name
        assert found.dtype is stored.get(name, exported[name]).dtype


def test_a_tensor_that_would_lie_unaligned_goes_to_another_file(tmp_path: Path) -> None:
    """Readers view the mapped bytes in the tensor's type."""
    tensors = {"odd": torch.ones(3).bfloat16(), "wide": torch.ones(2), "more": torch.ones(2)}
    save_hf(tensors.items(), tmp_path / "out", source_folder(tmp_path))
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    assert index["odd"] != index["wide"] == index["more"]
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], tensors[name])


def test_save_replaces_a_folder_whole(tmp_path: Path) -> None:
    source = source_folder(tmp_path)
    save_hf([("a", torch.zeros(2))], tmp_path / "out", source)
    save_hf([("b", torch.ones(2))], tmp_path / "out", source)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failed_save_keeps_the_old_folder_and_empties_the_iterator(tmp_path: Path) -> None:
    source = source_folder(tmp_path)
    save_hf([("a", torch.zeros(2))], tmp_path / "out", source)
    left: list[str] = ["x", "y", "z"]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        while left:
            yield left.pop(), torch.ones(2)

    with pytest.raises(RuntimeError, match=r"cannot write the model to .*out: .*nowhere"):
        save_hf(tensors(), tmp_path / "out", tmp_path / "nowhere")
    assert not left
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_other_ranks_only_iterate(tmp_path: Path) -> None:
    left = iter([("a", torch.empty(0)), ("b", torch.empty(0))])
    save_hf(left, tmp_path / "out", tmp_path / "nowhere", writer=False)
    assert next(left, None) is None
    assert not (tmp_path / "out").exists()
