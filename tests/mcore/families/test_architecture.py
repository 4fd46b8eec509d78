"""config.json: what is read, what is honoured, what is refused by name."""

from typing import Any

import pytest
import transformers

from fiberpo_megatron.mcore.families import FAMILIES, REQUIRED, Rope, read_architecture, used_fields
from fiberpo_megatron.mcore.families.config_fields import HARMLESS
from tests.distributed.parity import DEEPSEEK_V3, QWEN3_MOE

MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 163840,
}
"""Moonlight-16B-A3B's, as its authors write it."""

CLASSES = (
    transformers.Qwen3MoeConfig,
    transformers.Qwen3Config,
    transformers.Qwen2Config,
    transformers.LlamaConfig,
    transformers.MixtralConfig,
    transformers.DeepseekV3Config,
)


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda c: c.model_type)
def test_transformers_own_defaults_are_read(config_class: Any):
    config = config_class()
    architecture = read_architecture(config.to_dict())
    assert architecture.layers == config.num_hidden_layers
    assert architecture.key_value_heads == config.num_key_value_heads
    assert architecture.rope.theta == config.rope_parameters["rope_theta"]
    count = architecture.experts and architecture.experts.count
    assert count == getattr(config, "num_local_experts", None)


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda c: c.model_type)
def test_every_field_of_transformers_is_in_the_table_with_its_default(config_class: Any):
    """A field that a new version of transformers adds has to be judged, not skipped."""
    fields = FAMILIES[config_class.model_type].fields
    # by class: an instance has already filled in what follows from other fields
    written_as = {stored: name for name, stored in config_class.attribute_map.items()}
    names = {
        name: name if hasattr(config_class, name) else written_as.get(name, name) for name in config_class().to_dict()
    }
    defaults = {name: getattr(config_class, attribute, None) for name, attribute in names.items()}
    known = fields.used.keys() | fields.fixed.keys() | fields.harmless | HARMLESS | {"sliding_window", "layer_types"}
    assert defaults.keys() <= known
    for name, default in fields.used.items():
        if default is not REQUIRED and name in defaults and name not in ("rope_parameters", "num_local_experts"):
            assert default == (defaults[name] or default if name == "mlp_only_layers" else defaults[name]), name
    for name, values in fields.fixed.items():
        if defaults.get(name) is not None:
            assert defaults[name] == values[0], name


def test_moonlight():
    architecture = read_architecture(MOONLIGHT)
    latent, experts = architecture.latent, architecture.experts
    assert latent is not None and latent.query_rank is None and architecture.head_dim == 192
    assert experts is not None and experts.dense_layers == (0,) and experts.groups is None
    assert experts.shared_ffn_size == 2 * 1408 and experts.scaling == 2.446
    assert architecture.rope == Rope(50000.0)
    assert used_fields(MOONLIGHT)["routed_scaling_factor"] == 2.446 and "auto_map" not in used_fields(MOONLIGHT)


def test_deepseek_v3_itself():
    given = {"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32}}
    given["rope_scaling"]["original_max_position_embeddings"] = 4096
    config = {**transformers.DeepseekV3Config().to_dict(), "rope_parameters": None, "rope_theta": 10000, **given}
    architecture = read_architecture(config)
    experts = architecture.experts
    assert architecture.rope == Rope(10000.0, "yarn", 40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert experts is not None and (experts.groups, experts.groups_per_token) == (8, 4)
    assert architecture.predict_layers == 1


def test_a_missing_field_has_the_familys_own_default():
    bare = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 32}
    bare |= {"vocab_size": 10, "rope_theta": 1e4}
    assert read_architecture({**bare, "model_type": "qwen3"}).head_dim == 128
    assert read_architecture({**bare, "model_type": "llama"}).head_dim == 2
    assert read_architecture({**bare, "model_type": "mixtral"}).key_value_heads == 8
    assert read_architecture({**bare, "model_type": "mixtral"}).norm_eps == 1e-5
    assert read_architecture({**bare, "model_type": "llama"}).norm_eps == 1e-6


def test_both_places_of_rope_theta():
    new = {k: v for k, v in QWEN3_MOE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert read_architecture(new) == read_architecture(QWEN3_MOE)


def test_dense_layers_between_experts():
    experts = read_architecture({**QWEN3_MOE, "mlp_only_layers": [0], "decoder_sparse_step": 2}).experts
    assert experts is not None and experts.dense_layers == (0, 2)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic' is not built"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type 'longrope' is not built"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "factor = None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 2}},
            "high_freq_factor = 2; Megatron computes llama3 with 4",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "mscale_all_dim": 1.0}},
            "mscale and mscale_all_dim are built together",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.5}},
            "attention_factor = 1.5 is not built",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_theta": 1.0}},
            "rope_parameters = .* and rope_scaling = .* disagree",
        ),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"use_qk_norm": False}, "use_qk_norm = False"),
        ({"norm_after_attention": True}, "norm_after_attention = True is not known and might change"),
        ({"num_experts": None}, "num_experts = None"),
        ({"is_causal": False}, "is_causal = False"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1 is not built; supported here: 2 to 8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is not built"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None; a number above 0"),
        ({"rope_theta": None}, "rope_theta = None; a number above 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        read_architecture({**QWEN3_MOE, **change})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False with num_experts_per_tok = 4"),
        ({"num_experts_per_tok": 2}, "topk_group = 2 with num_experts_per_tok = 2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2 differs"),
        ({"n_shared_experts": None}, "n_shared_experts = None"),
        ({"kv_lora_rank": 0}, "kv_lora_rank = 0"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor = 0.0; a number above 0"),
        ({"n_group": 3}, "n_group = 3 with topk_group = 2 and n_routed_experts = 8"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 is not built; supported here: 1 to 4"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear' is not built; supported here: default"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}, "max_position_embeddings": 64},
            "truncate = False",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_by_name_in_deepseek(change: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        read_architecture({**DEEPSEEK_V3, **change})


def test_mlp_bias_of_llama():
    llama = {**transformers.LlamaConfig().to_dict(), "mlp_bias": True}
    with pytest.raises(ValueError, match="mlp_bias = True"):
        read_architecture(llama)


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda c: c.model_type)
def test_theta_has_the_familys_own_default(config_class: Any):
    """Llama 2's config.json has none."""
    assert FAMILIES[config_class.model_type].fields.used["rope_theta"] == config_class.default_theta
    given = {**config_class().to_dict(), "rope_parameters": None}
    assert read_architecture(given).rope.theta == config_class.default_theta


def test_the_theta_that_is_used_is_the_one_that_is_shown():
    nested = {**QWEN3_MOE, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    assert "rope_theta" not in used_fields(nested) and used_fields(QWEN3_MOE)["rope_theta"] == 10000.0


def test_fields_that_say_what_qwen3_is_anyway():
    said = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert read_architecture({**QWEN3_MOE, **said}) == read_architecture(QWEN3_MOE)


def test_a_window_counts_in_families_without_use_sliding_window():
    mixtral = {**transformers.MixtralConfig().to_dict(), "sliding_window": 8, "use_sliding_window": False}
    with pytest.raises(ValueError, match="sliding_window = 8 is not built"):
        read_architecture(mixtral)


def test_an_unused_window_is_fine():
    read_architecture({**QWEN3_MOE, "sliding_window": 4096, "use_sliding_window": False})
    read_architecture({**QWEN3_MOE, "sliding_window": 4096})
