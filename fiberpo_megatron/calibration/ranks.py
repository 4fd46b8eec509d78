"""This module is one rank of a calibration; `fiberpo calibrate` starts it for every GPU of a machine.

Run it as `python -m fiberpo_megatron.calibration.ranks JOB.json OUT.json`; rank 0 writes what all measured together.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiberpo_megatron import durable
from fiberpo_megatron.calibration.links import LinkTimes, on_one_machine, time_links
from fiberpo_megatron.calibration.passes import ModelTimes, PassTimes, time_passes
from fiberpo_megatron.calibration.products import time_copies, time_products
from fiberpo_megatron.config import Config
from fiberpo_megatron.mcore.families import read_hf_config
from fiberpo_megatron.mcore.parallel.layout import start_layout, stop_layout


@dataclass(frozen=True)
class Job:
    """Says what the ranks measure."""

    config: str
    """The config as JSON; its layout is that of the ranks at hand."""
    tokens: list[int]
    length: int
    folder: str
    """Where checkpoints are written, and removed."""


@dataclass(frozen=True)
class RankTimes:
    """Holds what the ranks measured together."""

    ranks: int
    one_machine: bool
    products: dict[str, list[float]]
    copies: list[float]
    links: list[LinkTimes]
    passes: list[PassTimes]
    models: list[ModelTimes]

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "RankTimes":
        """Return what `asdict` and JSON made of one."""
        parts = {"links": LinkTimes, "passes": PassTimes, "models": ModelTimes}
        return cls(**{**found, **{name: [kind(**item) for item in found[name]] for name, kind in parts.items()}})


def measure(job: Job) -> RankTimes:
    """Return what this rank measured together with the others."""
    config = Config.model_validate_json(job.config)
    hf_config = read_hf_config(config.model.path, config.model.family)
    layout = start_layout(hf_config, config.parallel, config.run)
    try:
        products = time_products(layout.device, layout.barrier)
        copies = time_copies(layout.device, layout.barrier)
        links = time_links(layout.device)
        passes, models = time_passes(config, hf_config, layout, job.tokens, job.length, Path(job.folder))
        return RankTimes(layout.world_size, on_one_machine(), products, copies, links, passes, models)
    finally:
        stop_layout()


def main(words: Sequence[str]) -> int:
    """Run one rank; rank 0 writes the file."""
    job, out = (Path(word) for word in words)
    found = measure(Job(**json.loads(job.read_text())))
    if os.environ.get("RANK", "0") == "0":
        with durable.replaced(out, text=True) as file:
            json.dump(asdict(found), file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
