"""Publications of what changed: what the trainer writes, and what the engines' plugin makes of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiberpo_megatron.engines.command import PLUGIN
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.weight_sync import delta
from fiberpo_megatron.weight_sync.disk import DiskPublisher
from tests.engines.fake_server import FakeServers
from tests.weight_sync.sources import Tensors, context
from tests.weight_sync.test_publishing import ENGINES

WEIGHTS = {
    "a": torch.randn(40, 50),
    "b": torch.randn(60, 70).bfloat16(),
    "same": torch.randn(30),
    "c": torch.arange(100, dtype=torch.int64),
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(PLUGIN)
    import fiberpo_delta

    return fiberpo_delta


@pytest.fixture
def published(tmp_path: Path):
    """Return a function that publishes weights and returns the folder; the engines are fakes that load nothing."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.txt").write_text("words")
    save_file(WEIGHTS, model / "model.safetensors")
    with EnginePool(ENGINES, timeout_s=5, transport=FakeServers()) as pool:
        publishing = DiskPublisher(context(pool, model, tmp_path / "run"), shard_bytes=9000, delta=True)

        def publish(weights: dict[str, torch.Tensor], version: str) -> Path:
            publishing.publish(Tensors(weights.items()), version)
            return publishing.folder / version

        yield publish
        publishing.close()


def changed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights of which a few elements differ, one of them by its sign of zero alone."""
    new = {name: tensor.clone() for name, tensor in weights.items()}
    new["a"].view(-1)[[3, 1999]] = torch.tensor([-0.0, 7.0])
    new["b"].view(-1)[::900] += 1
    new["c"] += 1
    return new


def copy_of(mirror: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in mirror.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_copy_is_what_was_published_bit_for_bit(plugin, published, tmp_path):
    mirror, first, second = tmp_path / "mirror", WEIGHTS, changed(WEIGHTS)
    first["a"].view(-1)[3] = 0.0
    plugin.take(published(first, "1"), mirror)
    assert_equal(copy_of(mirror), first)
    assert (mirror / "config.json").exists() and (mirror / "tokenizer.txt").read_text() == "words"
    folder = published(second, "2")
    files = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert files.keys() == {"a#at", "a#to", "b#at", "b#to", "c"}, "few elements, few elements, all elements, none"
    assert files["a#at"].tolist() == [3, 1999] and len(files["b#to"]) == 5
    plugin.take(folder, mirror)
    assert_equal(copy_of(mirror), second)
    plugin.take(published(second, "3"), mirror)
    assert not list((tmp_path / "run/published/3").glob("*.safetensors")), "nothing has changed"
    assert_equal(copy_of(mirror), second)


def test_a_copy_of_another_publication_is_not_built_upon(plugin, published, tmp_path):
    mirror = tmp_path / "mirror"
    plugin.take(published(WEIGHTS, "1"), mirror)
    published(changed(WEIGHTS), "2")
    folder = published(WEIGHTS, "3")
    with pytest.raises(plugin.BadPublication, match=r"does not hold the weights .* builds \(2\)"):
        plugin.take(folder, mirror)
    with pytest.raises(plugin.BadPublication, match=plugin.BASE_IS_MISSING):
        plugin.take(folder, tmp_path / "new")
    assert plugin.BASE_IS_MISSING == delta.BASE_IS_MISSING and plugin.MANIFEST == delta.MANIFEST
    assert (plugin.AT, plugin.TO) == (delta.AT, delta.TO)


def test_a_damaged_publication_is_noticed_and_the_copy_is_not_used_again(plugin, published, tmp_path):
    mirror = tmp_path / "mirror"
    plugin.take(published(WEIGHTS, "1"), mirror)
    folder = published(changed(WEIGHTS), "2")
    file = next(file for file in folder.glob("*.safetensors") if "a#to" in load_file(file))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for said in ("1 tensors are not those of the trainer", plugin.BASE_IS_MISSING):
        with pytest.raises(plugin.BadPublication, match=said):
            plugin.take(folder, mirror)


def test_a_file_that_writes_outside_of_a_tensor_is_refused(plugin, published, tmp_path):
    mirror = tmp_path / "mirror"
    plugin.take(published(WEIGHTS, "1"), mirror)
    folder = published(changed(WEIGHTS), "2")
    file = next(file for file in folder.glob("*.safetensors") if "a#to" in load_file(file))
    save_file({"a#at": torch.tensor([2000], dtype=torch.int32), "a#to": torch.zeros(1)}, file)
    with pytest.raises(plugin.BadPublication, match="positions of changes lie outside"):
        plugin.take(folder, mirror)


def test_names_of_files_lead_nowhere_else(plugin, published, tmp_path):
    folder = published(WEIGHTS, "1")
    manifest = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps({**manifest, "files": ["../model/config.json"]}))
    with pytest.raises(plugin.BadPublication, match="is no name of a file"):
        plugin.take(folder, tmp_path / "mirror")
