"""Write the demo's model folder: a Qwen3-MoE config (1.8M parameters) and a character tokenizer, no weights.

The files are committed; run `python examples/demo/make_model.py [FOLDER]` after a change here.
"""

import json
import sys
from pathlib import Path
from typing import Any

SPECIAL = ["<pad>", "<eos>", "<unk>"]
CHARACTERS = "0123456789+-*/=<>:;,.?!()[]|_#&^% \nabcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*SPECIAL, *CHARACTERS]

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.0,
    "output_router_logits": False,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index("<eos>"),
    "pad_token_id": VOCABULARY.index("<pad>"),
    "torch_dtype": "float32",
    "use_cache": True,
}

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(SPECIAL)
    ],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": "[\\s\\S]"},
        "behavior": "Isolated",
        "invert": False,
    },
    "post_processor": None,
    "decoder": {"type": "Fuse"},
    "model": {
        "type": "WordLevel",
        "vocab": {token: number for number, token in enumerate(VOCABULARY)},
        "unk_token": "<unk>",
    },
}

TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "model_max_length": CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
}


def write_model(folder: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json into `folder`."""
    write_files(folder, {"config": CONFIG, "tokenizer": TOKENIZER, "tokenizer_config": TOKENIZER_CONFIG})


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Write each of `files` as JSON into `folder`, under its name and the ending .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_model(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "model")
