"""Planned bytes of parameters, gradients and optimizer state against the tensors of real Megatron ranks."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.optimizers import make_optimizer
from fiberpo_megatron.mcore.optimizers.adam import Adam
from fiberpo_megatron.mcore.optimizers.settings import OptimizerConfig
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.planning.states import Position, StateBytes, state_bytes
from tests.distributed.parity import DEEPSEEK_V3, QWEN3_MOE, make_batch, make_config, micro_batches_for
from tests.planning.layouts import next_layout

# Sizes that 64 does not divide, so that padding inside and at the end of the buffers counts.
ODD = {**QWEN3_MOE, "vocab_size": 53, "moe_intermediate_size": 20}
DENSE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


class TorchAdam(Adam):
    """torch's AdamW, which ranks without a GPU use, also keeps a float32 step count for each parameter."""

    def state_bytes(self, shape: Sequence[int]) -> int:
        return super().state_bytes(shape) + 4


def _bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for groups in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            for group in getattr(part, groups, []):
                yield from group
        for state in part.optimizer.state.values():
            yield from state.values()


def measure(hf_config: dict[str, Any], settings: list[dict[str, Any]]) -> list[tuple[Position, StateBytes]]:
    """Position and bytes of this rank for every setting, after one optimiser step."""
    from megatron.core import parallel_state

    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.types import Coefficients

    found = []
    for sections in settings:
        config = make_config(**sections)
        layout = next_layout(hf_config, config)
        policy = build_policy(config, hf_config, layout)
        batches = micro_batches_for(make_batch(), layout, None)
        policy.step(batches, lambda log_probs, where: Coefficients(log_probs.double().exp()), 1.0)
        position = Position(
            layout.pipeline_rank,
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_rank(),
        )
        buffers = [buffer for chunk in policy.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        measured = StateBytes(
            parameters=_bytes(p for model in policy.models for p in model.parameters()),
            gradients=_bytes(buffer.grad_data for buffer in buffers),
            optimizer=_bytes(_optimizer_tensors(policy.optimizer)),
        )
        found.append((position, measured))
    return found


def _settings(*layouts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every layout in both types, with and without the distributed optimizer, with and without a trained router."""
    return [
        {
            "parallel": {**layout, "distributed_optimizer": distributed},
            "model": {"dtype": dtype, "train_router": distributed == (dtype == "float32")},
        }
        for layout in layouts
        for dtype in ("float32", "bfloat16")
        for distributed in (True, False)
    ]


@pytest.mark.parametrize(
    ("hf_config", "ranks", "layouts", "kind"),
    [
        (
            ODD,
            2,
            [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {"context": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
            "adam",
        ),
        pytest.param(
            ODD,
            4,
            [{"tensor": 2, "pipeline": 2}, {"expert": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 2}],
            "adam",
            marks=pytest.mark.exhaustive,
        ),
        (DEEPSEEK_V3, 2, [{"tensor": 2}, {"expert": 2}], "adam"),
        (DENSE, 2, [{}, {"tensor": 2}, {"pipeline": 2}], "adam"),
        (ODD, 2, [{"expert": 2}, {"pipeline": 2}], "tests.distributed.optimizers:Momentum"),
    ],
    ids=["experts-2", "experts-4", "latent-2", "dense-tied-2", "momentum-2"],
)
def test_exact_to_the_byte(hf_config: dict[str, Any], ranks: int, layouts: list[dict[str, Any]], kind: str):
    settings = _settings(*layouts)
    for sections in settings:
        sections["optimizer"] = {"kind": kind, "eps": None}
    optimizer = TorchAdam() if kind == "adam" else make_optimizer(OptimizerConfig(kind=kind))
    architecture = read_architecture(hf_config)
    for rank, found in enumerate(run_ranks(ranks, measure, hf_config, settings, timeout_s=240)):
        for sections, (position, measured) in zip(settings, found):
            model = ModelConfig(path="unused", **sections["model"])
            parallel = ParallelConfig(**sections["parallel"])
            planned = state_bytes(architecture, model, parallel, ranks, position, optimizer)
            assert planned == measured, f"rank {rank} of {ranks}, {sections}"
