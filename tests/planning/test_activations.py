"""Planned activation bytes against what autograd keeps in real passes of the CPU platform."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.settings import ModelConfig, ParallelConfig
from fiberpo_megatron.planning.activations import Row, activation_bytes
from tests.distributed.parity import DEEPSEEK_V3, QWEN3_MOE, make_batch, make_config, micro_batches_for
from tests.planning.layouts import next_layout

MOE = {**QWEN3_MOE, "hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 48, "num_hidden_layers": 2}
WIDE = {**MOE, "num_hidden_layers": 4, "num_experts_per_tok": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32}
LATENT = {**DEEPSEEK_V3, "hidden_size": 64}
DENSE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 51,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
}


class LiveBytes:
    """Bytes of the storages that autograd holds for backward passes, each counted once; and their peak."""

    def __init__(self, not_counted: set[int]) -> None:
        self._not_counted = not_counted
        self._holders: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "Kept":
        return Kept(tensor, self)

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._not_counted:
            return
        before = self._holders.get(storage.data_ptr(), 0)
        self._holders[storage.data_ptr()] = before + by
        if 0 in (before, before + by):
            self.now += by * storage.nbytes()
            self.peak = max(self.peak, self.now)


class Kept:
    """A saved tensor; counted as long as autograd holds it."""

    def __init__(self, tensor: Tensor, live: LiveBytes) -> None:
        self.tensor, self.live = tensor, live
        live.change(tensor, 1)

    def __del__(self) -> None:
        self.live.change(self.tensor, -1)


def measure(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[int, int, Row]]:
    """(stage, peak bytes, row) of this rank in every case: four equal rows through an optimiser step."""
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.types import Coefficients

    found = []
    for hf_config, sections in cases:
        config = make_config(**sections)
        layout = next_layout(hf_config, config)
        policy = build_policy(config, hf_config, layout)
        (row,) = micro_batches_for(make_batch(), layout, None)
        own = {p.untyped_storage().data_ptr() for model in policy.models for p in model.parameters()}
        live, single = LiveBytes(own), config.batch.kept_forwards == 1
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda kept: kept.tensor):
            policy.step(
                [row] * 4, lambda log_probs, where: Coefficients(log_probs.double().exp()), 1.0, single_pass=single
            )
        tokens = len(row.tokens) * layout.context_size
        squares = int(row.cu_seqlens.diff().square().sum())
        found.append((layout.pipeline_rank, live.peak, Row(tokens, len(row.response_positions), squares=squares)))
    return found


def case(hf_config: dict[str, Any], dtype: str, recompute: str = "none", kept: int = 1, **parallel: int) -> Any:
    model = {"dtype": dtype, "recompute": recompute}
    return hf_config, {"model": model, "parallel": parallel, "batch": {"kept_forwards": kept}}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (
            1,
            [
                case(hf_config, dtype, recompute)
                for hf_config in (MOE, WIDE, DENSE, LATENT)
                for dtype in ("float32", "bfloat16")
                for recompute in ("none", "full")
            ]
            + [
                case(MOE, "bfloat16", "none", 3),
                case(DENSE, "float32", "full", 3),
                case(LATENT, "bfloat16", "full", 8),
            ],
        ),
        (
            2,
            [
                case(MOE, "bfloat16", tensor=2),
                case(MOE, "float32", tensor=2, expert_tensor=2),
                case(MOE, "bfloat16", context=2),
                case(DENSE, "float32", context=2),
                case(DENSE, "bfloat16", tensor=2),
                case(LATENT, "bfloat16", tensor=2),
                case(WIDE, "bfloat16", expert=2),
                case(WIDE, "bfloat16", pipeline=2),
                case(WIDE, "bfloat16", "full", pipeline=2),
                case(WIDE, "float32", pipeline=2, virtual_pipeline=2),
            ],
        ),
    ],
    ids=["1-rank", "2-ranks"],
)
def test_within_15_percent(ranks: int, cases: list[tuple[dict[str, Any], dict[str, Any]]]):
    by_rank = run_ranks(ranks, measure, cases, timeout_s=240)
    wrong = []
    for index, (hf_config, sections) in enumerate(cases):
        parallel = ParallelConfig(**sections["parallel"])
        planned, measured = [], []
        for found in by_rank:
            stage, peak, row = found[index]
            measured.append(peak)
            planned.append(
                activation_bytes(
                    read_architecture(hf_config),
                    ModelConfig(path="unused", **sections["model"]),
                    parallel,
                    row,
                    stage=stage,
                    micro_batches=4,
                    implementation="local",
                    kept=sections["batch"]["kept_forwards"],
                )
            )
        if parallel.expert > 1:  # which expert a token goes to is chance; all ranks together get every token
            planned, measured = [sum(planned)], [sum(measured)]
        ratios = [p / m for p, m in zip(planned, measured)]
        print(hf_config["model_type"], sections, [round(r, 3) for r in ratios], measured)
        wrong += [(sections, ratio) for ratio in ratios if not 0.85 < ratio < 1.15]
    assert not wrong
