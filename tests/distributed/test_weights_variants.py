"""config.json as model makers publish it, and settings away from the defaults: we compute what transformers computes.

Dimensions are scaled down; every other field is as published (from memory of the public files). Fields that are
refused without a look at the weights are in tests/mcore/families/test_architecture.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.model import build_model
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.mcore.schedule import Schedule
from fiberpo_megatron.mcore.settings import ModelConfig
from fiberpo_megatron.mcore.weights import export_hf, load_hf, save_hf
from fiberpo_megatron.trainer import transformers_reference as reference
from tests.distributed.parity import make_batch, make_config, micro_batches_for
from tests.mcore.weights.weights_reference import read_config, write_random

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "initializer_range": 0.1,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 12}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16", "transformers_version": "4.44.0"}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    **TOKENS,
}
QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    **TOKENS,
}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pretraining_tp": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "use_cache": True,
    **TOKENS,
    **LATENT,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1, "type": "yarn"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {**LLAMA, "num_key_value_heads": 4, "max_position_embeddings": 4096},  # says no rope_theta
    "Llama-3.1-8B": {
        **LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": [1, 2, 3],
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rope_scaling": {**_LLAMA3, "rope_type": "llama3"},
        "rope_theta": 500000.0,
    },
    "SmolLM2-135M-Instruct": {
        **LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Qwen2.5-7B": {
        **QWEN,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_mrope": False,
    },
    "Qwen3-30B-A3B": {
        **QWEN,
        **EXPERTS,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        **TOKENS,
    },
    "DeepSeek-V3": {  # after conversion from FP8: without quantization_config
        **DEEPSEEK,
        "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
    },
    "Moonlight-16B-A3B": {
        **DEEPSEEK,
        "max_position_embeddings": 8192,
        "n_group": 1,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
    },
}
_FREQUENCIES = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
UNUSUAL: dict[str, dict[str, Any]] = {
    "one key-value head": {"model_type": "llama", "num_key_value_heads": 1},
    "tied, head size, epsilon": {
        "model_type": "qwen2",
        "head_dim": 12,
        "rms_norm_eps": 1e-2,
        "tie_word_embeddings": True,
    },
    "window without use_sliding_window": {"model_type": "qwen2", "sliding_window": 8, "rope_theta": 1e6},
    "linear, as it was written before": {
        "model_type": "qwen3",
        "head_dim": 12,
        "rope_theta": 1e3,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "yarn, both mscale": {
        "model_type": "qwen2",
        "rope_parameters": {**_FREQUENCIES, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "yarn, not rounded": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "rope_parameters": {**_FREQUENCIES, "truncate": False, "beta_fast": 8, "beta_slow": 2},
    },
    "one expert, every second layer": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
    },
    "three of four experts": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "head_dim": 12,
    },
    "no theta": {"model_type": "mixtral", "num_local_experts": 4},
    "three of four groups": {"model_type": "deepseek_v3", **LATENT, "topk_group": 3, "num_experts_per_tok": 6},
    "one expert, not normalised": {
        "model_type": "deepseek_v3",
        **LATENT,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "tie_word_embeddings": True,
    },
    "no layer with experts": {"model_type": "deepseek_v3", **LATENT, "first_k_dense_replace": 3, "v_head_dim": 13},
}
MODELS = {**PUBLISHED, **UNUSUAL}
PREDICT_LAYER = {"embed_tokens.weight": (37, 32), "eh_proj.weight": (32, 64), "shared_head.norm.weight": (32,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model per config, in bfloat16 where config.json says so, with that very config.json."""
    root = tmp_path_factory.mktemp("variants")
    for name, fields in MODELS.items():
        config = {**SMALL, **fields}
        family = config["model_type"]
        shaping = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
        write_random(root / name, family, shaping)
        (root / name / "config.json").write_text(json.dumps(config))
        tensors = load_file(root / name / "model.safetensors")
        if "torch_dtype" in config:
            tensors = {key: value.bfloat16() for key, value in tensors.items()}
        for part, shape in PREDICT_LAYER.items() if config.get("num_nextn_predict_layers") else ():
            tensors[f"model.layers.3.{part}"] = torch.ones(shape)
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    return root


def scores(root: Path) -> dict[str, Tensor]:
    """Our log-probs of the batch's response tokens by model, which is also saved."""
    config = make_config()
    layout = start_layout(read_config(root / "Llama-2-7b"), config.parallel, config.run)
    (micro_batch,) = micro_batches_for(make_batch(vocab=37, name="single"), layout, None)
    found = {}
    for name in MODELS:
        hf_config = read_config(root / name)
        chunks = build_model(read_architecture(hf_config), ModelConfig(path=root / name, dtype="float32"), layout)
        load_hf(chunks, hf_config, root / name, layout)
        (answer,) = Schedule(chunks, chunks, layout, 512).forward([micro_batch], 1.0)
        found[name] = answer.log_probs
        save_hf(export_hf(chunks, hf_config, layout), root / "saved" / name, root / name)
    return found


def test_as_transformers(folder: Path) -> None:
    """transformers runs what we saved, so that both ways are compared."""
    batch = make_batch(vocab=37, name="single")
    [found] = run_ranks(1, scores, folder)
    tokens = torch.from_numpy(batch.tokens)
    for name in MODELS:
        stored, saved = (load_file(path / name / "model.safetensors") for path in (folder, folder / "saved"))
        own = {key: value for key, value in stored.items() if not key.startswith("model.layers.3.")}  # predicts further
        assert saved.keys() == own.keys(), name
        assert all(saved[key].dtype is own[key].dtype and torch.equal(saved[key], own[key]) for key in own), name
        logits = reference.run(reference.load_model(folder / "saved" / name), tokens).logits
        wanted = logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0][batch.response_mask[1:]]
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
