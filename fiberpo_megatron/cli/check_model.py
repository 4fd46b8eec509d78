"""This module runs `fiberpo check-model DIR`: transformers in this process, then the ranks of the asked layout."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fiberpo_megatron.config import ConfigError, load_config


def check_model(folder: Path, prompt: str | None, tolerance: float, overrides: Sequence[str]) -> int:
    """Compare log-probs; 0 when they agree, 1 when not, 2 when a rank could not compare them.

    `overrides`: as for `fiberpo train`.
    """
    scratch = Path(tempfile.mkdtemp(prefix="fiberpo-check-model-"))
    settings = {
        "run": {"folder": str(scratch)},
        "model": {"path": str(folder), "dtype": "float32"},
    }
    (scratch / "config.toml").write_text(tomli_w.dumps(settings))
    code = 2
    try:
        config = load_config(scratch / "config.toml", overrides)
        if config.run.folder != scratch:
            raise ConfigError(
                f"run.folder = {config.run.folder}: check-model writes into a temporary folder of its own, which only "
                "you can read; leave --run.folder out"
            )
        from fiberpo_megatron.trainer.transformers_reference import disagrees, prepare

        prepare(config, prompt, tolerance)
        from fiberpo_megatron.launch.local import launch_ranks

        on_cpu = {"CUDA_VISIBLE_DEVICES": ""} if config.model.dtype == "float32" else {}  # no float32 attention on GPUs
        code = launch_ranks(
            ["-m", "fiberpo_megatron.cli.rank", "check-model", str(scratch / "config.toml"), *overrides],
            config.parallel.world_size(),
            scratch / "logs",
            {"OMP_NUM_THREADS": str(config.run.threads_per_rank), **on_cpu},
        )
        if code == 1 and not disagrees(config.run.folder):
            code = 2
    finally:
        if code == 0 or not (scratch / "logs").exists():  # the message of a failed rank names its log
            shutil.rmtree(scratch)
    return code
