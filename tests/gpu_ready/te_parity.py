"""Runs of the parity suite on the ranks of a driver, with models for its rotary kernels besides."""

from pathlib import Path
from typing import Any

from tests.distributed import parity
from tests.distributed.parity import Case, Run

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_FUSED = {**parity.DEEPSEEK_V3, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "dense yarn": {**parity.MODELS["dense tied"], "rope_scaling": _YARN},
    "deepseek fused": _FUSED,
    "deepseek yarn": {**_FUSED, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
}
"""Trajectories are up to 64 tokens long, so that YaRN stretches part of the positions. The kernel of latent attention
takes sizes that are powers of two; "deepseek" has others and goes without it."""
LATENT_FUSED = ("deepseek fused", "deepseek yarn")


def write_checkpoints(folder: Path) -> None:
    """Write a Hugging Face folder for each model."""
    parity.MODELS.update(MODELS)  # in this process alone, which ends with the run
    parity.write_checkpoints(folder)


def run_cases(cases: list[Case], folder: Path, parallel: dict[str, int]) -> list[Run]:
    """Return log-probs, gradients and trained parameters of every case on one layout.

    Raises AssertionError when latent attention of a GPU goes without its kernels where they take its sizes, or the
    other way round.
    """
    from fiberpo_megatron.mcore import platform
    from tests.gpu_ready.te_emulation import rope

    parity.MODELS.update(MODELS)
    runs = parity.run_cases(cases, folder, parallel)
    fused = platform.activate().name == "gpu" and any(case.model in LATENT_FUSED for case in cases)
    called = {kernel for kernel, count in rope.latent_calls.items() if count}
    assert called == ({"query", "key and value"} if fused else set()), f"{[case.model for case in cases]}: {called}"
    return runs


def run_as_one_sequence(cases: list[Case], folder: Path, parallel: dict[str, int]) -> list[Run]:
    """Do as `run_cases`, but lose the bounds between the sequences of a row."""
    from fiberpo_megatron.mcore.gpu_platform import GpuPlatform

    stock = GpuPlatform.packed_sequences

    def joined(self: Any, cu_seqlens: Any, max_seqlen: int, *rest: int) -> Any:
        return stock(self, cu_seqlens[[0, -1]], int(cu_seqlens[-1]), *rest)

    GpuPlatform.packed_sequences = joined  # type: ignore[method-assign]
    return run_cases(cases, folder, parallel)


def run_with_plain_scores(cases: list[Case], folder: Path, parallel: dict[str, int]) -> list[Run]:
    """Do as `run_cases`, but leave YaRN's scale of the scores out."""
    from fiberpo_megatron.mcore import transformer_config

    transformer_config._concentration = lambda rope: 1.0
    return run_cases(cases, folder, parallel)
