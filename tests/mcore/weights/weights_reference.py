"""Tiny Hugging Face models of every family, with transformers' own answers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from fiberpo_megatron.trainer import transformers_reference as reference
from fiberpo_megatron.types import RolloutBatch

_LEFT_OUT: Any = object()
"""Value of a field of the common shape that a family does not have."""
_SHAPE: dict[str, Any] = {
    "vocab_size": 51,  # odd: two tensor-parallel ranks pad it
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,  # two groups of two queries on each of two tensor-parallel ranks
    "num_key_value_heads": 4,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_DEEPSEEK: dict[str, Any] = {
    "initializer_range": 0.1,  # 0.2 makes these so sharp that float32 rounding reaches 1e-5
    "head_dim": _LEFT_OUT,
    "num_key_value_heads": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "num_nextn_predict_layers": 0,
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {"head_dim": _LEFT_OUT}),
    "llama": ("llama", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", _QWEN3_MOE),
    "qwen3_moe-unnormalised-tied": (
        "qwen3_moe",
        {**_QWEN3_MOE, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "qwen3_moe-mixed": ("qwen3_moe", {**_QWEN3_MOE, "mlp_only_layers": [1], "decoder_sparse_step": 1}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "rope_parameters": _YARN, "rms_norm_eps": 1e-5}),
    "deepseek_v3-moonlight": (
        "deepseek_v3",
        {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    ),
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 2e4, **_LLAMA3}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": {**_YARN, "mscale": None, "mscale_all_dim": None}}),
    "deepseek_v3-yarn-plain": (
        "deepseek_v3",
        {**_DEEPSEEK, "rope_parameters": {**_YARN, "mscale": None, "mscale_all_dim": None}},
    ),
}
"""Scaled rotary embeddings."""
MODELS = {**DENSE, **MOE, **ROPE}
"""By name: model_type and config fields beyond the common shape."""


def write_model(folder: Path, name: str, max_shard_size: str = "5GB") -> Any:
    """Save one of MODELS as transformers does; returns it."""
    family, fields = MODELS[name]
    given = {key: value for key, value in {**_SHAPE, **fields}.items() if value is not _LEFT_OUT}
    return write_random(folder, family, given, max_shard_size)


def write_random(folder: Path, family: str, fields: dict[str, Any], max_shard_size: str = "5GB") -> Any:
    """Save a randomly drawn model as transformers does; returns it. Norms and biases are drawn too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@dataclass
class Expected:
    """transformers' answers for a batch, by flat token index."""

    logits: Tensor
    layers: dict[int, Tensor]
    routers: dict[int, Tensor]
    log_probs: Tensor
    """[N]; 0 for the first token of a trajectory."""


def expected(model: Any, batch: RolloutBatch, temperature: float) -> Expected:
    """The reference of a batch, each trajectory alone."""
    runs = [reference.run(model, torch.from_numpy(batch.tokens[start:end])) for start, end in _bounds(batch)]
    logits = torch.cat([run.logits for run in runs])
    log_probs = torch.zeros(len(batch.tokens))
    for (start, end), run in zip(_bounds(batch), runs):
        log_probs[start + 1 : end] = _scores(run.logits, run.tokens, temperature)
    return Expected(
        logits,
        {layer: torch.cat([run.layers[layer] for run in runs]) for layer in runs[0].layers},
        {layer: torch.cat([run.routers[layer] for run in runs]) for layer in runs[0].routers},
        log_probs,
    )


def write_gradients(model: Any, batch: RolloutBatch, weights: NDArray[Any], temperature: float, folder: Path) -> None:
    """Save d loss / d parameter under the parameters' names; loss = -sum_j weights_j log-prob_j, j [N]."""
    for start, end in _bounds(batch):
        tokens = torch.from_numpy(batch.tokens[start:end])
        scores = _scores(model(input_ids=tokens[None]).logits[0], tokens, temperature)
        wanted = torch.from_numpy(weights[start + 1 : end] * batch.response_mask[start + 1 : end]).float()
        (-(scores * wanted).sum()).backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(folder)


def _bounds(batch: RolloutBatch) -> list[tuple[int, int]]:
    return list(zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist()))


def _scores(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """[L - 1] log-probs of tokens[1:]."""
    return (logits / temperature).log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: value for file in files for name, value in file.items()}
