"""This module reads from config.json the sizes of a model that time depends on, for every family it can be read for.

The trainer's own families give exact parameter lists (`planning/parameters.py`); this description is coarser, and so
covers models that the trainer cannot train yet but whose published runs the ledger holds, such as those with linear
attention in most layers. tests/planning/test_shapes.py compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.mcore.families import Architecture
from fiberpo_megatron.planning.parameters import expert_parameters, model_parameters


@dataclass(frozen=True)
class ModelShape:
    """These are the sizes of a decoder; parameters are counts over the whole model."""

    layers: int
    hidden: int
    vocab: int
    heads: int
    query_size: int
    """Size of a head's queries and keys."""
    value_size: int
    cache_heads: int
    """Key-value heads of a cached token; 1 where the cache is a latent vector that every GPU holds whole."""
    cache_size: int
    """Numbers of one such head and layer: keys and values, or the latent."""
    attention_layers: int
    """Layers whose attention reads all earlier tokens."""
    state_bytes: int
    """Bytes of the float32 state that the other layers (linear attention) keep for each request, over all layers."""
    moe_layers: int
    experts: int
    """Routed experts of a layer; 0 for a dense model."""
    experts_per_token: int
    expert_ffn: int
    ffn: int
    """Inner size of what every token passes in a layer of experts (shared experts), or of a dense layer."""
    dense_parameters: int
    """Parameters outside of embedding, output layer and routed experts."""
    expert_parameters: int
    """Parameters of all routed experts."""
    tied: bool

    @property
    def table(self) -> int:
        """Return the number of parameters of the embedding, which are those of the output layer."""
        return self.vocab * self.hidden

    @property
    def total(self) -> int:
        return self.dense_parameters + self.expert_parameters + self.table * (1 if self.tied else 2)

    @property
    def routed(self) -> float:
        """Return the parameters of the experts that one token uses, over all layers."""
        return self.expert_parameters * self.experts_per_token / self.experts if self.experts else 0.0

    @property
    def active(self) -> float:
        """Return the number of parameters that a token is multiplied with, the output layer's included."""
        return self.dense_parameters + self.routed + self.table

    def cache_bytes(self, tensor: int, width: int) -> int:
        """Return the bytes of one cached token on each of the `tensor` GPUs of an engine."""
        heads = -(-self.cache_heads // tensor)
        return self.attention_layers * heads * self.cache_size * width


def read_shape(hf_config: Mapping[str, Any]) -> ModelShape:
    """Read a shape from config.json. Raises KeyError with the name of a field that is missing."""
    config: Mapping[str, Any] = hf_config.get("text_config", hf_config)
    layers, hidden, heads = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    experts = int(_first(config, "num_experts", "n_routed_experts", "num_local_experts") or 0)
    attention_layers, state = layers, 0
    rank = config.get("kv_lora_rank")
    if rank:
        rotary, plain = int(config["qk_rope_head_dim"]), int(config["qk_nope_head_dim"])
        query_size, value_size = rotary + plain, int(config["v_head_dim"])
        cache_heads, cache_size = 1, int(rank) + rotary
        mixing = _latent_parameters(config, hidden, heads, rotary, plain, value_size) * layers
    else:
        query_size = value_size = int(config.get("head_dim") or hidden // heads)
        cache_heads = int(config.get("num_key_value_heads") or heads)
        cache_size = 2 * query_size
        gate = 2 if config.get("attn_output_gate") or config.get("full_attention_interval") else 1
        full = hidden * query_size * ((gate + 1) * heads + 2 * cache_heads)
        attention_layers = _full_attention_layers(config, layers)
        linear = layers - attention_layers
        mixing = full * attention_layers + _linear_parameters(config, hidden) * linear
        state = _linear_state(config) * linear
    dense_layers = _dense_layers(config, layers) if experts else layers
    moe_layers = layers - dense_layers
    expert_ffn = int(_first(config, "moe_intermediate_size", "intermediate_size") or 0) if experts else 0
    shared = _shared_ffn(config, expert_ffn) if experts else 0
    mlp = 3 * hidden * int(config.get("intermediate_size") or 0)
    dense = mixing + dense_layers * mlp + moe_layers * (3 * hidden * shared + experts * hidden)
    dense += (2 * layers + 1) * hidden
    return ModelShape(
        layers=layers,
        hidden=hidden,
        vocab=int(config["vocab_size"]),
        heads=heads,
        query_size=query_size,
        value_size=value_size,
        cache_heads=cache_heads,
        cache_size=cache_size,
        attention_layers=attention_layers,
        state_bytes=state,
        moe_layers=moe_layers,
        experts=experts,
        experts_per_token=int(_first(config, "num_experts_per_tok", "moe_topk") or 0) if experts else 0,
        expert_ffn=expert_ffn,
        ffn=shared if experts else int(config["intermediate_size"]),
        dense_parameters=dense,
        expert_parameters=moe_layers * experts * 3 * hidden * expert_ffn,
        tied=bool(hf_config.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
    )


def shape_of(architecture: Architecture) -> ModelShape:
    """Return the shape of a model that one of the trainer's families describes, from its exact list of parameters."""
    experts, latent = architecture.experts, architecture.latent
    table = architecture.vocab_size * architecture.hidden_size
    routed = expert_parameters(architecture)
    tables = table if architecture.tied_embeddings else 2 * table
    return ModelShape(
        layers=architecture.layers,
        hidden=architecture.hidden_size,
        vocab=architecture.vocab_size,
        heads=architecture.heads,
        query_size=architecture.head_dim,
        value_size=latent.value_size if latent else architecture.head_dim,
        cache_heads=1 if latent else architecture.key_value_heads,
        cache_size=latent.key_value_rank + latent.rotary_size if latent else 2 * architecture.head_dim,
        attention_layers=architecture.layers,
        state_bytes=0,
        moe_layers=architecture.layers - len(experts.dense_layers) if experts else 0,
        experts=experts.count if experts else 0,
        experts_per_token=experts.per_token if experts else 0,
        expert_ffn=experts.ffn_size if experts else 0,
        ffn=experts.shared_ffn_size if experts else architecture.ffn_size,
        dense_parameters=model_parameters(architecture) - routed - tables,
        expert_parameters=routed,
        tied=architecture.tied_embeddings,
    )


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _latent_parameters(
    config: Mapping[str, Any], hidden: int, heads: int, rotary: int, plain: int, value_size: int
) -> int:
    rank, query_rank = int(config["kv_lora_rank"]), config.get("q_lora_rank")
    queries = heads * (rotary + plain)
    total = hidden * (rank + rotary) + rank * heads * (plain + value_size) + heads * value_size * hidden
    return total + (int(query_rank) * (hidden + queries) if query_rank else hidden * queries)


def _full_attention_layers(config: Mapping[str, Any], layers: int) -> int:
    kinds = config.get("layer_types")
    if kinds:
        return sum(kind != "linear_attention" for kind in kinds)
    return layers // int(config.get("full_attention_interval") or 1)


def _linear_parameters(config: Mapping[str, Any], hidden: int) -> int:
    """Return the parameters of a gated delta net: queries, keys, values, gate and output, and two gates per head."""
    if "linear_num_value_heads" not in config:
        return 0
    keys = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
    values = int(config["linear_num_value_heads"]) * int(config["linear_value_head_dim"])
    return hidden * (2 * keys + 3 * values + 2 * int(config["linear_num_value_heads"]))


def _linear_state(config: Mapping[str, Any]) -> int:
    """Return the bytes of one layer's state: a float32 matrix of keys by values for each head of values."""
    heads, keys, values = (
        int(config.get(f"linear_{name}") or 0) for name in ("num_value_heads", "key_head_dim", "value_head_dim")
    )
    return 4 * heads * keys * values


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    first = int(config.get("first_k_dense_replace") or 0)
    step = int(config.get("decoder_sparse_step") or 1)
    only = set(config.get("mlp_only_layers") or ())
    return sum(layer < first or layer in only or (layer + 1) % step != 0 for layer in range(layers))


def _shared_ffn(config: Mapping[str, Any], expert_ffn: int) -> int:
    size = config.get("shared_expert_intermediate_size")
    return int(size) if size else int(config.get("n_shared_experts") or 0) * expert_ffn
