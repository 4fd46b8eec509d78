"""The declarative tables and the transforms, without a model."""

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.mcore.families import (
    FAMILIES,
    Architecture,
    GateUp,
    Qkv,
    Split,
    Transform,
    Vocabulary,
    family_of,
    read_architecture,
)
from fiberpo_megatron.mcore.families.transforms import Shard
from fiberpo_megatron.mcore.families.weight_tables import canonical_name, match_name


def model_of(vocab_size: int, heads: int, key_value_heads: int, head_dim: int) -> Architecture:
    return read_architecture(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 5,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": head_dim,
        }
    )


MODEL = model_of(vocab_size=11, heads=8, key_value_heads=4, head_dim=3)


class Tensors:
    """A TensorReader over tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.elements = 0

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.tensors[name].shape[dim] if stop is None else stop
        part = self.tensors[name].narrow(dim, start, stop - start)
        self.elements += part.numel()
        return part


def test_qkv_by_hand() -> None:
    """2 groups of 2 queries, head size 1: rows are q0 q1 k0 v0 | q2 q3 k1 v1."""
    model = model_of(vocab_size=1, heads=4, key_value_heads=2, head_dim=1)
    read = Tensors({"q": torch.tensor([0, 1, 2, 3]), "k": torch.tensor([10, 11]), "v": torch.tensor([20, 21])})
    shards = [Qkv().load(read, ["q", "k", "v"], (4,), Shard(rank, 2), model) for rank in (0, 1)]
    assert [shard.tolist() for shard in shards] == [[0, 1, 10, 20], [2, 3, 11, 21]]


def test_gate_up_by_hand() -> None:
    read = Tensors({"gate": torch.arange(4)[:, None], "up": torch.arange(10, 14)[:, None]})
    shards = [GateUp().load(read, ["gate", "up"], (4, 1), Shard(rank, 2), MODEL) for rank in (0, 1)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("transform", "whole"),
    [
        (Split(0), (8, 5)),
        (Split(1), (5, 8)),
        (Vocabulary(), (12, 5)),
        (GateUp(), (16, 5)),
        (Qkv(), (48, 5)),
        (Qkv(), (48,)),
    ],
)
def test_merge_undoes_load(transform: Transform, whole: tuple[int, ...], size: int) -> None:
    dim = transform.dim if isinstance(transform, Split) else 0
    local = tuple(n // size if d == dim else n for d, n in enumerate(whole))
    shapes = transform.hf_shapes(local, size, MODEL)
    names = [f"t{i}" for i in range(len(shapes))]
    read = Tensors({name: torch.randn(shape) for name, shape in zip(names, shapes)})
    shards = [transform.load(read, names, local, Shard(rank, size), MODEL) for rank in range(size)]
    assert all(shard.shape == local for shard in shards)
    assert read.elements == sum(t.numel() for t in read.tensors.values())  # every element is read by one rank
    merged = transform.merge(shards, MODEL)
    assert all(torch.equal(tensor, read.tensors[name]) for name, tensor in zip(names, merged, strict=True))
    assert all(tensor.untyped_storage().data_ptr() != shards[0].untyped_storage().data_ptr() for tensor in merged)


def test_vocabulary_padding_is_zero() -> None:
    read = Tensors({"t": torch.ones(11, 2)})
    last = Vocabulary().load(read, ["t"], (6, 2), Shard(1, 2), MODEL)
    assert last[:5].eq(1).all() and last[5:].eq(0).all()
    beyond = Vocabulary().load(read, ["t"], (6, 2), Shard(2, 3), MODEL)
    assert beyond.eq(0).all()


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="4 key-value heads do not divide over 3"):
        Qkv().hf_shapes((16,), 3, MODEL)
    with pytest.raises(ValueError, match="make 48"):
        Qkv().hf_shapes((20,), 2, MODEL)
    with pytest.raises(ValueError, match="fewer than vocab_size = 11"):
        Vocabulary().hf_shapes((5, 2), 2, MODEL)


@pytest.mark.parametrize(
    ("name", "layer", "canonical"),
    [
        (
            "decoder.layers.1.self_attention.linear_qkv.weight",
            5,
            "decoder.layers.5.self_attention.linear_qkv.weight",
        ),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
            2,
            "decoder.layers.2.input_layernorm.weight",
        ),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", 2, "decoder.layers.2.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.0.mlp.experts.linear_fc1.weight3",
            2,
            "decoder.layers.2.mlp.experts.7.linear_fc1.weight",
        ),
        (
            "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight",
            2,
            "decoder.layers.2.mlp.experts.7.linear_fc2.weight",
        ),
        ("embedding.word_embeddings.weight", None, "embedding.word_embeddings.weight"),
    ],
)
def test_local_and_transformer_engine_names_meet(name: str, layer: int | None, canonical: str) -> None:
    assert canonical_name(name, layer, first_expert=4) == canonical
    assert FAMILIES["qwen3_moe"].weights.rule_of(canonical)


def test_match_name() -> None:
    template = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    match = match_name(template, "model.layers.12.mlp.experts.3.up_proj.weight")
    assert match is not None and (match.layer, match.expert) == (12, 3)
    assert match_name(template, "model.layers.12.mlp.experts.x.up_proj.weight") is None
    assert match_name(template, "model.layers.12.mlp.experts.3.up_proj.weight_scale") is None


def test_order_of_export() -> None:
    table = FAMILIES["qwen3_moe"].weights
    names = [
        "output_layer.weight",
        "decoder.final_layernorm.weight",
        "decoder.layers.10.input_layernorm.weight",
        "decoder.layers.9.mlp.experts.10.linear_fc1.weight",
        "decoder.layers.9.mlp.experts.9.linear_fc2.weight",
        "decoder.layers.9.mlp.router.weight",
        "embedding.word_embeddings.weight",
    ]
    in_order = sorted(names, key=table.position)
    assert in_order == [*reversed(names[2:]), "decoder.final_layernorm.weight", "output_layer.weight"]


def test_an_unknown_family() -> None:
    message = "model_type = 'gpt_oss' is not supported; use one of deepseek_v3, llama, .* or set model.family"
    with pytest.raises(ValueError, match=message):
        family_of({"model_type": "gpt_oss"})


def test_a_config_without_a_needed_field() -> None:
    with pytest.raises(ValueError, match="vocab_size = None"):
        read_architecture(
            {
                "model_type": "llama",
                "num_hidden_layers": 2,
                "intermediate_size": 4,
                "num_attention_heads": 4,
                "hidden_size": 32,
            }
        )
