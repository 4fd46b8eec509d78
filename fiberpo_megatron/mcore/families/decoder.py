"""Turns the fields that most families share into an Architecture. This module imports neither torch nor Megatron."""

from fiberpo_megatron.mcore.families.architecture import Architecture, Experts, LatentAttention
from fiberpo_megatron.mcore.families.config_fields import ConfigReader
from fiberpo_megatron.mcore.families.rope import read_rope


def decoder(
    config: ConfigReader,
    *,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    experts: Experts | None = None,
    latent: LatentAttention | None = None,
    predict_layers: int = 0,
) -> Architecture:
    """Return the architecture of a config.json whose fields have the names that Llama gave them.

    The arguments are what a family adds to Llama; `Architecture` explains each. With latent attention the sizes of the
    heads follow from `latent`, without it from `num_key_value_heads` and `head_dim`. Raises ValueError that names a
    missing or unsupported field.
    """
    heads = config.number("num_attention_heads")
    if latent:
        key_value_heads, head_dim = heads, latent.plain_size + latent.rotary_size
    else:
        key_value_heads = config.number_if_given("num_key_value_heads") or heads
        head_dim = config.number_if_given("head_dim") or config.number("hidden_size") // heads
    return Architecture(
        model_type=str(config.get("model_type")),
        layers=config.number("num_hidden_layers"),
        hidden_size=config.number("hidden_size"),
        ffn_size=config.number("intermediate_size"),
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=config.number("vocab_size"),
        norm_eps=config.positive("rms_norm_eps"),
        rope=read_rope(config.given, config.get("rope_theta"), latent=latent is not None),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        initializer_range=config.positive("initializer_range"),
        max_positions=config.number("max_position_embeddings"),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        experts=experts,
        latent=latent,
        predict_layers=predict_layers,
    )


def experts_per_token(config: ConfigReader, available: int, at_least: int = 1) -> int:
    """Return `num_experts_per_tok`. Raises ValueError when it lies outside `at_least` to `available`.

    A family that normalises the probabilities of the chosen experts asks for at least 2: the probability of a single
    expert would always be 1, which Megatron does not build.
    """
    value = config.number("num_experts_per_tok")
    if not at_least <= value <= available:
        raise ValueError(
            f"config.json: num_experts_per_tok = {value} is not built; supported here: {at_least} to {available}"
        )
    return value
