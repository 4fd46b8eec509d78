"""Layouts that do not divide are refused with what does not, the value seen, and values that would."""

from typing import Any

import pytest

from fiberpo_megatron.config.schema import ParallelConfig
from fiberpo_megatron.mcore.checks import check_layout
from tests.distributed.parity import QWEN3_MOE

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
    ],
)
def test_accepted(parallel: dict[str, int], world_size: int):
    check_layout(QWEN3_MOE, ParallelConfig(**parallel), world_size)


@pytest.mark.parametrize(
    "parallel, world_size, message",
    [
        ({"tensor": 3}, 3, r"parallel.tensor = 3 does not divide num_attention_heads = 4; use one of \[1, 2, 4\]"),
        ({"tensor": 4}, 4, r"num_key_value_heads = 2; use one of \[1, 2\]"),
        ({"pipeline": 3}, 3, r"parallel.pipeline = 3 does not divide num_hidden_layers = 4"),
        ({"pipeline": 2, "virtual_pipeline": 3}, 2, r"layers per stage = 2; use one of \[1, 2\]"),
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
