"""Layouts that do not divide are refused with what does not, the value seen, and values that would."""

from pathlib import Path
from typing import Any

import pytest

from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.parallel.checks import check_layout, check_routers, layers_per_chunk, layout_problems
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from tests.distributed.parity import DEEPSEEK_V3, QWEN3_MOE

DENSE = {k: v for k, v in QWEN3_MOE.items() if "expert" not in k and "topk" not in k and "moe_" not in k}
DENSE["model_type"] = "qwen3"


@pytest.mark.parametrize(
    "parallel, world_size",
    [
        ({}, 1),
        ({"expert": 2}, 2),
        ({"tensor": 2, "pipeline": 4, "expert": 4, "context": 2}, 32),
        ({"pipeline": 2, "virtual_pipeline": 2}, 2),
        ({"tensor": 2, "expert_tensor": 2}, 2),
        ({"pipeline": 3, "uneven_stages": True}, 3),
    ],
)
def test_accepted(parallel: dict[str, int], world_size: int):
    check_layout(QWEN3_MOE, ParallelConfig(**parallel), world_size)


@pytest.mark.parametrize(
    "parallel, world_size, message",
    [
        ({"tensor": 3}, 3, r"parallel.tensor = 3 does not divide num_attention_heads = 4; use one of \[1, 2\]"),
        ({"tensor": 4}, 4, r"num_key_value_heads = 2; use one of \[1, 2\]"),
        ({"pipeline": 3}, 3, r"= 3 does not divide num_hidden_layers = 4; .* chunks of \[1, 2, 1\] layers"),
        ({"pipeline": 8}, 8, "= 8 x 1 needs a layer for each chunk, but num_hidden_layers = 4"),
        ({"pipeline": 2, "virtual_pipeline": 3}, 2, "= 2 x 3 needs a layer for each chunk"),
        ({"virtual_pipeline": 2}, 1, "set virtual_pipeline = 1 or pipeline to at least 2"),
        ({"expert": 3}, 3, r"the number of experts = 8; use one of \[1, 2, 4, 8\]"),
        ({"expert": 4}, 2, r"= 4 x 1 does not divide tensor x context x data = 2; .* one of \[1, 2\]"),
        ({"expert_tensor": 5}, 5, "the experts' intermediate size = 24"),
        ({"tensor": 2, "context": 2}, 6, "start a multiple of 4 processes"),
        ({"data": 4}, 2, "start 4 processes, or set parallel.data = 2"),
    ],
)
def test_refused(parallel: dict[str, int], world_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        check_layout(QWEN3_MOE, ParallelConfig(**parallel), world_size)


@pytest.mark.parametrize(
    "change, parallel, message",
    [
        ({}, {"expert": 2}, "a qwen3 model has no experts; set both to 1"),
        ({"intermediate_size": 63}, {"tensor": 2}, "intermediate_size = 63"),
        ({"vocab_size": 1}, {"tensor": 2}, "leaves a rank without any of vocab_size = 1"),
    ],
)
def test_refused_for_dense_models(change: dict[str, Any], parallel: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        check_layout({**DENSE, **change}, ParallelConfig(**parallel), 2)


@pytest.mark.parametrize(
    "change, parallel, message",
    [
        ({}, {"tensor": 8}, r"num_attention_heads = 4; use one of \[1, 2, 4\]"),
        ({"moe_intermediate_size": 25}, {"tensor": 2}, r"the shared experts' intermediate size = 25; use one of \[1\]"),
        ({"intermediate_size": 65}, {"tensor": 2}, "intermediate_size = 65"),
        (
            {"num_hidden_layers": 10},
            {"pipeline": 2, "virtual_pipeline": 3},
            r"layers per stage = 5; use one of \[1, 5\]",
        ),
    ],
)
def test_refused_for_latent_attention(change: dict[str, Any], parallel: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        check_layout({**DEEPSEEK_V3, **change}, ParallelConfig(**parallel), 8)


def test_everything_is_told_at_once():
    problems = layout_problems(read_architecture(QWEN3_MOE), ParallelConfig(tensor=3, pipeline=3, expert=3), 9)
    assert [p.split()[0] for p in problems] == ["parallel.tensor", "parallel.pipeline", "parallel.expert"]


@pytest.mark.parametrize(
    "layers, chunks, wanted",
    [(4, 2, [2, 2]), (4, 3, [1, 2, 1]), (94, 4, [23, 24, 24, 23]), (61, 8, [7, 8, 8, 8, 8, 8, 7, 7])],
)
def test_left_over_layers_go_to_the_middle(layers: int, chunks: int, wanted: list[int]):
    assert layers_per_chunk(layers, chunks) == wanted and sum(wanted) == layers


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"context": 2}])
def test_auxiliary_loss_refused(parallel: dict[str, int]):
    architecture, loss = read_architecture(QWEN3_MOE), ModelConfig(path=Path("m"), router_aux_loss=0.01)
    check_routers(architecture, ModelConfig(path=Path("m")), ParallelConfig(**parallel))
    check_routers(architecture, loss, ParallelConfig(pipeline=2, expert=2))
    with pytest.raises(ValueError, match="model.router_aux_loss = 0.01 gives wrong gradients"):
        check_routers(architecture, loss, ParallelConfig(**parallel))


def test_a_bias_that_is_not_there_cannot_move():
    moving = ModelConfig(path=Path("m"), router_bias_update_rate=0.001)
    check_routers(read_architecture(DEEPSEEK_V3), moving, ParallelConfig())
    with pytest.raises(ValueError, match="this qwen3_moe model has no correction bias; set it to 0"):
        check_routers(read_architecture(QWEN3_MOE), moving, ParallelConfig())
