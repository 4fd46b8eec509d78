"""Log-probs and entropy against transformers, for every family, with its own weights in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fiberpo_megatron.mcore.layout import start_layout
from fiberpo_megatron.mcore.policy import build_policy
from fiberpo_megatron.types import concatenated_response_tokens
from tests.distributed.parity import TEMPERATURE, make_batch, make_config, micro_batches_for
from tests.distributed.spawn import run_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 128,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "head_dim": 16, "num_experts": 8}
FAMILIES = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts_per_tok=2, norm_topk_prob=True),
    "qwen3_moe, probabilities not normalised, tied": transformers.Qwen3MoeConfig(
        **SHAPE, **EXPERTS, num_experts_per_tok=3, norm_topk_prob=False, tie_word_embeddings=True
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "llama": transformers.LlamaConfig(**SHAPE),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}


def ours(folder: str, parallel: dict[str, int]) -> dict[int, tuple[float, float]]:
    hf_config = json.loads((Path(folder) / "config.json").read_text())
    config = make_config(parallel=parallel, model={"path": folder, "random_init": False})
    layout = start_layout(hf_config, config.parallel, config.run)
    batches = micro_batches_for(make_batch(), layout, 72)
    scores = build_policy(config, hf_config, layout).log_probs(batches, TEMPERATURE)
    assert scores is not None
    index = concatenated_response_tokens(batches).tolist()
    return dict(zip(index, zip(scores.log_probs.tolist(), scores.entropy.tolist())))


def theirs(model: torch.nn.Module) -> dict[int, tuple[float, float]]:
    batch = make_batch()
    out = {}
    for start, end in zip(batch.offsets[:-1], batch.offsets[1:]):
        tokens = torch.from_numpy(batch.tokens[start:end])
        with torch.no_grad():
            rows = (model(tokens[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        entropy = -(rows.exp() * rows).sum(-1)
        for at in range(1, end - start):
            if batch.response_mask[start + at]:
                out[int(start + at)] = (float(rows[at - 1, tokens[at]]), float(entropy[at - 1]))
    return out


@pytest.mark.parametrize("family", list(FAMILIES))
def test_log_probs_and_entropy(family: str, tmp_path: Path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        FAMILIES[family], dtype=torch.float32, experts_implementation="eager"
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms of one and biases of zero would hide a mistake
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    wanted = theirs(model.double().eval())
    found = {}
    for answer in run_ranks(2, ours, str(tmp_path), {"tensor": 2}):
        found |= answer
    assert found.keys() == wanted.keys()
    for token, (log_prob, entropy) in wanted.items():
        assert found[token][0] == pytest.approx(log_prob, abs=1e-5)  # ours computes in float32
        assert found[token][1] == pytest.approx(entropy, abs=1e-5)
