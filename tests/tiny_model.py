"""A tiny random Qwen3-MoE in transformers: the reference that a real engine is compared with."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY, LAYERS, TOP_K, EOS = 64, 2, 2, 1


def write_checkpoint(folder: Path) -> Path:
    """Config and safetensors. Weights are large enough for log-probs that spread over several nats."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)


def moved(folder: Path, seed: int = 1) -> PreTrainedModel:
    """The checkpoint after a step that changes every weight, and log-probs by far more than rounding."""
    model = load(folder)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=noise))
    return model


def hugging_face_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as in the safetensors file: transformers 5 keeps the experts stacked in memory."""
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".experts.")
        if leaf == "gate_up_proj":
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                yield f"{stem}.experts.{expert}.gate_proj.weight", gate
                yield f"{stem}.experts.{expert}.up_proj.weight", up
        elif leaf == "down_proj":
            for expert, down in enumerate(tensor):
                yield f"{stem}.experts.{expert}.down_proj.weight", down
        else:
            yield name, tensor


@torch.no_grad()
def log_probs(model: PreTrainedModel, tokens: Sequence[int], temperature: float = 1.0) -> NDArray[np.float32]:
    """[len - 1] log-probs of tokens[1:]."""
    rows = (model(torch.tensor([list(tokens)])).logits[0] / temperature).log_softmax(-1)
    return rows[range(len(tokens) - 1), list(tokens[1:])].numpy()


@torch.no_grad()
def chosen_experts(model: PreTrainedModel, tokens: Sequence[int]) -> NDArray[np.int64]:
    """[len, layers, top_k] experts of every position."""
    output = model(torch.tensor([list(tokens)]), output_router_logits=True)
    return torch.stack([logits.topk(TOP_K).indices for logits in output.router_logits], dim=1).numpy()
