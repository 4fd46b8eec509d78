"""The reference of check-model: what it hands to the ranks, and model folders that bring code of their own."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.cli.check_model import check_model
from fiberpo_megatron.config import ConfigError
from fiberpo_megatron.data.tokenizer import load_tokenizer
from fiberpo_megatron.mcore.families import read_architecture, read_hf_config
from fiberpo_megatron.trainer.transformers_reference import Job, Reference, load_model, read_job, run, write_job
from tests.mcore.weights.weights_reference import write_model

TOKENIZER = Path(__file__).parents[2] / "examples/demo/model"


def test_the_job_is_plain_arrays(tmp_path: Path) -> None:
    layers = {0: torch.randn(3, 4), 11: torch.randn(3, 4)}
    written = Job(
        Reference(torch.tensor([5, 1, 2]), torch.randn(3, 7), layers, {1: torch.rand(3, 2)}), ["a", "\x1b", "ü"], 1e-4
    )
    write_job(written, tmp_path)
    read = read_job(tmp_path)
    assert (read.words, read.tolerance) == (written.words, written.tolerance)
    for name in ("tokens", "logits"):
        assert torch.equal(getattr(read.expected, name), getattr(written.expected, name))
    for name in ("layers", "routers"):
        ours, theirs = getattr(read.expected, name), getattr(written.expected, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[i], theirs[i]) for i in ours)


def test_a_planted_job_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    np.savez(tmp_path / "check.npz", described=np.array([Payload()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_job(tmp_path)
    (tmp_path / "check.npz").write_bytes(__import__("pickle").dumps(Payload()))
    with pytest.raises(ValueError):
        read_job(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_job_stays_in_a_private_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.folder = .*shared: check-model writes into a temporary folder"):
        check_model(tmp_path / "model", None, 1e-4, ["--run.folder", str(tmp_path / "shared")])
    assert not (tmp_path / "shared").exists()


@pytest.fixture
def refuse_questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers asks at the terminal whether it may run a folder's code, unless an option refuses it."""
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "n")
    yield
    assert not asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama with a tokenizer, and with code for everything that transformers would take from a folder."""
    made = tmp_path / "model"
    write_model(made, "llama")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, made)
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (made / f"{name}.py").write_text(code + "class Own:\n    pass\n")
    (made / "custom_generate").mkdir()
    (made / "custom_generate" / "generate.py").write_text(code)
    change(made / "config.json", auto_map=AUTO_MAP)
    change(made / "tokenizer_config.json", auto_map=AUTO_MAP)
    return made


AUTO_MAP = {
    "AutoConfig": "configuration_own.Own",
    "AutoModel": "modeling_own.Own",
    "AutoModelForCausalLM": "modeling_own.Own",
    "AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"],
}


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.usefixtures("refuse_questions")
def test_code_in_a_folder_of_a_known_model_is_ignored(folder: Path) -> None:
    assert load_tokenizer(folder).encode("1+1=")
    assert read_architecture(read_hf_config(folder)).layers == 4
    found = run(load_model(folder), torch.tensor([1, 2, 3]))
    assert len(found.layers) == 4
    assert not (folder.parent / "ran").exists()


@pytest.mark.usefixtures("refuse_questions")
@pytest.mark.parametrize(
    "read",
    [load_tokenizer, load_model, lambda folder: read_architecture(read_hf_config(folder))],
    ids=["tokenizer", "reference", "config"],
)
@pytest.mark.parametrize("auto_map", [AUTO_MAP, {key: f"somebody/model--{value}" for key, value in AUTO_MAP.items()}])
def test_a_model_that_exists_only_as_code_is_refused(
    read: Callable[[Path], Any], auto_map: dict[str, Any], folder: Path
) -> None:
    change(folder / "config.json", model_type="own", auto_map=auto_map, architectures=["Own"])
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type|trust_remote_code|custom code|cannot load"):
        read(folder)
    assert not (folder.parent / "ran").exists()


@pytest.mark.usefixtures("refuse_questions")
def test_weights_as_a_pickle_are_not_read(folder: Path) -> None:
    """Not even by the reference, if no safetensors are there."""
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (folder.parent / "ran",)

    torch.save({"model.norm.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder)
    assert not (folder.parent / "ran").exists()
