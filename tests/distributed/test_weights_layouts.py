"""Hugging Face weights in every layout: transformers' answers, an export equal bit for bit to the files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from fiberpo_megatron.mcore.layout import start_layout
from fiberpo_megatron.mcore.platform import activate
from fiberpo_megatron.mcore.policy import build_policy
from fiberpo_megatron.mcore.weights import export_hf
from fiberpo_megatron.types import concatenated_response_tokens
from tests.distributed.parity import TEMPERATURE, make_batch, make_config, micro_batches_for
from tests.distributed.spawn import run_ranks
from tests.mcore.weights_reference import (
    DENSE,
    MODELS,
    MOE,
    PROBE,
    read_config,
    reference_log_probs,
    reference_logits,
    write_model,
)

LAYOUTS: dict[str, tuple[int, dict[str, int], list[str]]] = {
    "one process": (1, {}, list(MODELS)),
    "TP2": (2, {"tensor": 2}, list(MODELS)),
    "PP2": (2, {"pipeline": 2}, list(MODELS)),
    "VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, list(MODELS)),
    "EP2": (2, {"expert": 2}, list(MOE)),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}, ["qwen3_moe", "qwen2", "qwen3-tied", "deepseek_v3"]),
    "PP2xEP2": (4, {"pipeline": 2, "expert": 2}, ["qwen3_moe", "mixtral", "deepseek_v3"]),
    "TP2xEP2, ETP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}, ["qwen3_moe", "deepseek_v3"]),
}
"""Processes, parallel sizes, models."""

Models = tuple[Path, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]


@dataclass
class Answer:
    """What one rank says of one model."""

    log_probs: dict[int, float]
    """By flat token index; empty away from the last pipeline stage."""
    exported: list[tuple[str, Tensor]]
    logits: NDArray[Any] | None
    """[26, 51] of the probe, on one process."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folder of all models (one in several files), transformers' log-probs of the test batch and logits."""
    root = tmp_path_factory.mktemp("models")
    batch = make_batch(vocab=51)
    log_probs, logits = {}, {}
    for name in MODELS:
        model = write_model(root / name, name, max_shard_size="50KB" if name == "mixtral" else "5GB")
        log_probs[name] = reference_log_probs(model, batch, TEMPERATURE)
        logits[name] = reference_logits(model)
    return root, log_probs, logits


def load_score_export(root: Path, names: list[str], parallel: dict[str, int]) -> dict[str, Answer]:
    """This rank's answer for every model."""
    config = make_config(parallel=parallel)
    layout = start_layout(read_config(root / names[0]), config.parallel, config.run)
    batch = make_batch(vocab=51)
    micro_batches = micro_batches_for(batch, layout, None)
    index = concatenated_response_tokens(micro_batches).tolist()
    out = {}
    for name in names:
        sections = make_config(parallel=parallel, model={"path": root / name, "random_init": False})
        policy = build_policy(sections, read_config(root / name), layout)
        scores = policy.log_probs(micro_batches, TEMPERATURE)
        # a bucket smaller than the model, so that several are sent
        exported = list(export_hf(policy.models, policy.hf_config, layout, bucket_bytes=20_000))
        by_token = dict(zip(index, scores.log_probs.tolist())) if scores else {}
        logits = probe_logits(policy.models[0]) if layout.world_size == 1 else None
        out[name] = Answer(by_token, exported, logits)
    return out


@torch.no_grad()
def probe_logits(model: Any) -> NDArray[Any]:
    """[26, 51] logits: the model itself ends with hidden states."""
    length = PROBE.numel()
    packed = activate().packed_sequences(torch.tensor([0, length], dtype=torch.int32), length, 0, 1)
    hidden = model(PROBE, torch.arange(length)[None], attention_mask=None, packed_seq_params=packed)
    logits: NDArray[Any] = (hidden.view(length, -1) @ model.output_weight().T).numpy()
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_and_out(layout: str, models: Models) -> None:
    root, log_probs, logits = models
    ranks, parallel, names = LAYOUTS[layout]
    outcomes = run_ranks(ranks, load_score_export, root, names, parallel)
    for name in names:
        answers = [outcome[name] for outcome in outcomes]
        scored = {token: value for answer in answers for token, value in answer.log_probs.items()}
        tokens = sorted(scored)
        assert len(tokens) == make_batch(vocab=51).response_mask.sum()
        got = np.array([scored[token] for token in tokens])
        # float32 sums in another order than transformers': about 1e-6 each
        np.testing.assert_allclose(got, log_probs[name][tokens], atol=1e-5, rtol=0, err_msg=name)
        if answers[0].logits is not None:
            np.testing.assert_allclose(answers[0].logits, logits[name], atol=1e-4, rtol=0, err_msg=name)
        files = [load_file(file) for file in sorted((root / name).glob("*.safetensors"))]
        stored = {tensor: value for file in files for tensor, value in file.items()}
        exported = dict(answers[0].exported)
        assert exported.keys() == stored.keys()
        assert all(torch.equal(exported[tensor], stored[tensor]) for tensor in stored)
        for other in answers[1:]:
            assert [tensor for tensor, _ in other.exported] == list(exported)
            assert all(len(value) == 0 for _, value in other.exported)


def test_families_are_covered() -> None:
    from fiberpo_megatron.mcore.weight_tables import FAMILIES

    assert {family for family, _ in MODELS.values()} == set(FAMILIES)
    assert not DENSE.keys() & MOE.keys()
