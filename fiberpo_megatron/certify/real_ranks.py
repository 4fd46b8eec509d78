"""This module tries an objective on real processes, whose reductions are those of a run (gloo, or NCCL on GPUs).

NCCL takes one rank for each GPU: where there are fewer GPUs than ranks, they run on the CPU and reduce over gloo.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.certify.batch import Batch
from fiberpo_megatron.certify.checks import Check, Result, check_results
from fiberpo_megatron.certify.gates import cuts
from fiberpo_megatron.certify.processes import run_ranks, too_few_gpus
from fiberpo_megatron.certify.ranks import in_order
from fiberpo_megatron.fibration import build_objective

PART = "The gates alone, ranks as processes that reduce as a run does"
MODEL: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""A layout is made for a model; this one is never built."""


def check_processes(
    named: tuple[str, dict[str, Any]], batches: Sequence[Batch], ranks: int, seed: int
) -> Iterator[Check]:
    """Yield a check for each batch, cut over `ranks` data-parallel processes; `named` are the objective and its
    options."""
    objective = build_objective(named[0], **named[1])
    parts = [_cut(batch, ranks, seed) for batch in batches]
    on_cpu = too_few_gpus(ranks)
    device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    what = f"{ranks} processes on " + ("GPUs, over NCCL" if device == "cuda" else "the CPU, over gloo")
    outcomes = run_ranks(ranks, _rank, named, [batch.tokens for batch in batches], parts, on_cpu=on_cpu)
    for number, batch in enumerate(batches):
        found = [outcome[number] for outcome in outcomes]
        result = Result(
            in_order([gradient for gradient, _, _ in found], parts[number]),
            in_order([ratio for _, ratio, _ in found], parts[number]),
            found[-1][2],
        )
        # Equal bits are claimed for one type of device: the one call is made where the ranks made theirs.
        wanted = Result.of(batch.tokens.to(device=device).call(objective))
        yield check_results(PART, what, batch.name, result, wanted)


def _cut(batch: Batch, ranks: int, seed: int) -> list[Tensor]:
    """Whole trajectories for two ranks, tokens at random for more of them."""
    whole = next((parts for _, parts in cuts(batch.tokens, seed) if len(parts) == ranks), None)
    if whole is not None:
        return whole
    owner = torch.randint(ranks, (len(batch.tokens),), generator=torch.Generator().manual_seed(seed))
    return [(owner == rank).nonzero()[:, 0] for rank in range(ranks)]


def _rank(named: tuple[str, dict[str, Any]], batches: Sequence[Any], parts: Sequence[Sequence[Tensor]]) -> list[Any]:
    """Run on each process: one call for each batch."""
    from fiberpo_megatron.config.schema import RunConfig
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.settings import ParallelConfig

    objective = build_objective(named[0], **named[1])
    layout = start_layout(MODEL, ParallelConfig(), RunConfig(distributed_timeout_s=120))
    found = []
    for tokens, own in zip(batches, parts):
        out = tokens.take(own[layout.rank]).to(device=layout.device).call(objective, layout.sum_over_tokens)
        assert out.metrics is not None, "the call was asked for metrics"
        found.append((out.gradient.cpu(), out.gated_ratio.cpu(), out.metrics.as_dict()))
    return found
