"""A family outside the package is one file: the example of docs/models.md, in real layouts and in the planner."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.config.schema import ParallelConfig
from fiberpo_megatron.mcore.families import FAMILIES, Family, family_of, read_architecture, read_hf_config
from fiberpo_megatron.planning.parameters import chunk_weights, model_parameters
from tests.distributed.parity import TEMPERATURE, make_batch, make_config, micro_batches_for
from tests.mcore.weights.weights_reference import expected, read_tensors, write_random

PAGE = Path(__file__).parents[3] / "docs/models.md"
PATH = "phi3_family:FAMILY"
FIELDS: dict[str, Any] = {
    "vocab_size": 51,  # odd: two tensor-parallel ranks pad it
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the family's file alone."""
    [source] = re.findall(r"```python\n(# phi3_family\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "phi3_family.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "phi3_family", raising=False)
    return tmp_path


@dataclass
class Answer:
    """Holds what one rank says."""

    log_probs: dict[int, float]
    """By flat token index; empty away from the last pipeline stage."""
    exported: dict[str, Tensor]
    shards: dict[str, Tensor] | str
    """The tensors of `WeightSource.local`, or the error that it raised."""
    parameters: int


def answer(folder: Path, parallel: dict[str, int]) -> Answer:
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.mcore.weights import export_hf
    from fiberpo_megatron.mcore.weights.source import MegatronWeights
    from fiberpo_megatron.types import concatenated_response_tokens

    os.chdir(folder)
    hf_config = read_hf_config(folder / "model", PATH)
    config = make_config(parallel=parallel, model={"path": folder / "model", "random_init": False})
    layout = start_layout(hf_config, config.parallel, config.run)
    policy = build_policy(config, hf_config, layout)
    batches = micro_batches_for(make_batch(), layout, None)
    scores = policy.log_probs(batches, TEMPERATURE)
    index = concatenated_response_tokens(batches).tolist()
    shards: dict[str, Tensor] | str
    try:
        shards = {shard.name: shard.tensor for shard in MegatronWeights(policy.models, hf_config, layout).local()}
    except ValueError as error:
        shards = str(error)
    return Answer(
        dict(zip(index, scores.log_probs.tolist())) if scores else {},
        dict(export_hf(policy.models, hf_config, layout, bucket_bytes=20_000)),
        shards,
        sum(parameter.numel() for model in policy.models for parameter in model.parameters()),
    )


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=["TP2", "PP2"])
def test_the_example_of_the_page(parallel: dict[str, int], folder: Path) -> None:
    """Log-probs are those of transformers, the export is what was loaded, and the plan counts the real parameters."""
    wanted = expected(write_random(folder / "model", "phi3", FIELDS), make_batch(), TEMPERATURE)
    stored = read_tensors(folder / "model")
    assert "model.layers.3.self_attn.qkv_proj.weight" in stored
    answers = run_ranks(2, answer, folder, parallel)
    found = {token: value for rank in answers for token, value in rank.log_probs.items()}
    tokens = sorted(found)
    assert len(tokens) == make_batch().response_mask.sum()
    # float32 sums in another order than transformers': about 1e-6 each
    torch.testing.assert_close(
        torch.tensor([found[token] for token in tokens]), wanted.log_probs[tokens], atol=1e-5, rtol=0
    )
    assert answers[0].exported.keys() == stored.keys()
    assert all(torch.equal(answers[0].exported[name], stored[name]) for name in stored)
    for rank in answers:
        if "tensor" in parallel:  # a rank's rows of a stacked tensor are not one block of it
            assert "linear_qkv.weight: under tensor parallelism Stacked, a transform" in str(rank.shards)
        else:
            assert isinstance(rank.shards, dict) and "model.layers.1.self_attn.qkv_proj.weight" in answers[0].shards
            assert all(torch.equal(tensor, stored[name]) for name, tensor in rank.shards.items())
    architecture, config = read_architecture(read_hf_config(folder / "model", PATH)), ParallelConfig(**parallel)
    assert model_parameters(architecture) == sum(tensor.numel() for tensor in stored.values())
    for rank, found_here in enumerate(answers):
        planned = chunk_weights(architecture, config, rank if config.pipeline > 1 else 0, 0)
        assert found_here.parameters == sum(weight.numel for weight in planned)


def test_an_installed_package_declares_its_family(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model_type = 'phi3' is not supported"):
        family_of({"model_type": "phi3"})
    installed = folder / "phi3_family-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: phi3-family\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[fiberpo.families]\nphi3 = {PATH}\n")
    monkeypatch.syspath_prepend(folder)
    family = family_of({"model_type": "phi3"})
    assert isinstance(family, Family) and read_architecture({"model_type": "phi3", **FIELDS}).key_value_heads == 4
    with pytest.raises(ValueError, match="resid_pdrop = 0.1 changes the computation"):
        read_architecture({"model_type": "phi3", **FIELDS, "resid_pdrop": 0.1})


def test_a_family_for_another_model_type(tmp_path: Path) -> None:
    config = {**FIELDS, "model_type": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hf_config = read_hf_config(tmp_path, "llama")
    assert family_of(hf_config) is FAMILIES["llama"] and family_of(config, "llama") is FAMILIES["llama"]
    assert read_architecture(hf_config).model_type == "mine"
    with pytest.raises(ValueError, match=r"'mine' is not supported; use one of deepseek_v3, llama.*model\.family"):
        read_architecture(read_hf_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:FAMILY", "there is no module 'no_such_module'"),
        ("lama", "did you mean 'llama'"),
        ("fiberpo_megatron.mcore.families.llama:nothing", "has no nothing"),
        ("fiberpo_megatron.mcore.families.llama:decoder", "not a Family; name the object that"),
    ],
)
def test_a_family_that_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        family_of({"model_type": "llama"}, name)
    assert f'model.family = "{name}"' in str(caught.value)


def test_a_model_cannot_name_its_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "model_type": "llama", "fiberpo_family": PATH}))
    with pytest.raises(ValueError, match="fiberpo_family must not stand in config.json"):
        read_hf_config(tmp_path)


def test_a_field_that_a_family_reads_without_declaring_it() -> None:
    from dataclasses import replace

    family = FAMILIES["llama"]
    used = {key: value for key, value in family.fields.used.items() if key != "head_dim"}
    with pytest.raises(ValueError, match=r"reads 'head_dim' of config\.json; declare it in `Fields\.used`"):
        replace(family, fields=replace(family.fields, used=used)).read_architecture({"model_type": "llama", **FIELDS})
