import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fiberpo_megatron.interfaces import NamedShape
from fiberpo_megatron.weight_sync.manifest import Manifest

WEIGHTS = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "lm_head.weight": torch.zeros(5, 2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": WEIGHTS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: WEIGHTS[n] for n in ("b", "lm_head.weight")}, tmp_path / "model-00002-of-00002.safetensors")
    return tmp_path


def check(manifest: Manifest, weights: dict[str, torch.Tensor]) -> None:
    manifest.check(NamedShape(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items())


def without(name: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in WEIGHTS.items() if n != name}


def test_all_of_the_folders_tensors_pass(folder):
    manifest = Manifest(folder)
    check(manifest, WEIGHTS)
    assert manifest.shapes is not None and manifest.shapes.keys() == WEIGHTS.keys()


def test_what_does_not_belong_is_refused(folder):
    with pytest.raises(ValueError, match="1 weights .* were not exported, the first is b;"):
        check(Manifest(folder), without("b"))
    with pytest.raises(ValueError, match="weight c is not in"):
        check(Manifest(folder), WEIGHTS | {"c": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight a has shape \(3, 2\), in .* it has \(2, 3\)"):
        check(Manifest(folder), WEIGHTS | {"a": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="a was exported twice"):
        Manifest(folder).check([NamedShape("a", (2, 3), torch.float32)] * 2)
    with pytest.raises(ValueError, match="exported no weights"):
        check(Manifest(folder), {})


def test_a_tied_output_layer_may_be_there_or_not(folder):
    with pytest.raises(ValueError, match="lm_head.weight"):
        check(Manifest(folder), without("lm_head.weight"))
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    check(Manifest(folder), without("lm_head.weight"))
    check(Manifest(folder), WEIGHTS)


def test_without_safetensors_the_first_publication_counts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    manifest = Manifest(tmp_path)
    check(manifest, WEIGHTS)
    with pytest.raises(ValueError, match="1 weights of the first publication were not exported"):
        check(manifest, without("b"))
