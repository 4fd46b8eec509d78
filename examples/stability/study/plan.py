"""This module lists what the study tries: cells, seeds, and the same number of configurations for every objective."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fiberpo_megatron.fibration import DEFAULT_BUDGETS
from study.training import Cell

PACES = ((1, 4, 3e-4), (2, 4, 3e-4), (2, 8, 6e-4))
"""Epochs, mini-batches and learning rate of the mild, the middle and the harsh cell of each task."""
CELLS = tuple(Cell(task, *pace) for task in ("short", "long", "domains") for pace in PACES)
SCREENING_CELLS = (Cell("short", *PACES[1]), Cell("long", *PACES[2]), Cell("domains", *PACES[2]))
"""Cells in which all configurations are tried."""
SCREENING_SEEDS = (5,)
FINAL_SEEDS = (6,)
"""Seeds of the second round of tuning."""
COMPARISON_SEEDS = tuple(range(8, 16))

Options = Mapping[str, Any]
DOMAIN_LEVELS = [["trajectory"], ["prompt_group"], ["domain"]]


def warm_up_of(seed: int) -> int:
    """Return the seed of the warmed-up model that a run with this seed starts from: four seeds share one."""
    return seed // 4


def _fiberpo(epsilon: float, *budgets: tuple[float, float], **more: Any) -> Options:
    names = ["trajectory", "prompt_group", "domain"]
    levels = {"levels": DOMAIN_LEVELS} if len(budgets) > 1 else {}
    return {"epsilon": epsilon, "budgets": dict(zip(names, map(list, budgets))), **levels, **more}


GRIDS: Mapping[str, tuple[Options, ...]] = {
    "fiberpo": (
        {},  # the paper's objective, with this project's first widths
        _fiberpo(0.2, (0.22, 0.18), unclip_positive=True, dual_clip=3.0),  # the authors' code: epsilon 0.2, delta 0.4
        _fiberpo(0.2, (0.30, 0.25), pessimistic=True),
        _fiberpo(0.2, (0.12, 0.10), pessimistic=True, k_max=4.0, dual_clip=3.0),
        _fiberpo(0.2, (0.05, 0.04), pessimistic=True, k_max=1.0),
        _fiberpo(0.4, (0.05, 0.04), pessimistic=True, k_max=16.0),
        _fiberpo(0.05, (0.02, 0.015), pessimistic=True, k_max=16.0),
        _fiberpo(0.2, (0.12, 0.10), (0.08, 0.06), (0.06, 0.05), pessimistic=True, k_max=1.0),
    ),
    "grpo": (
        {},  # epsilon 0.2
        *({"epsilon": width} for width in (0.02, 0.05, 0.1, 0.4)),
        {"epsilon": [0.28, 0.2]},  # DAPO's
        *({"epsilon": width, "dual_clip": 3.0} for width in (0.1, 0.2)),
    ),
    "gspo": (
        {},  # epsilon (4e-4, 3e-4)
        *(
            {"epsilon": list(pair)}
            for pair in (
                (1e-4, 8e-5),
                (1e-3, 8e-4),
                (2e-3, 1.5e-3),
                (4e-3, 3e-3),
                (1e-2, 8e-3),
                (4e-2, 3e-2),
                (1e-2, 2e-3),
            )
        ),
    ),
}
"""Per objective the configurations of the first round: eight each."""
REFINEMENTS: Mapping[str, tuple[Options, ...]] = {
    "fiberpo": (
        _fiberpo(0.02, (0.02, 0.015), pessimistic=True, k_max=16.0, dual_clip=3.0),
        _fiberpo(0.02, (0.05, 0.04), pessimistic=True, k_max=4.0, dual_clip=3.0),
    ),
    "grpo": ({"epsilon": 0.02, "dual_clip": 3.0}, {"epsilon": 0.01}),
    "gspo": ({"epsilon": [1e-3, 2e-3]}, {"epsilon": [2e-2, 1.5e-2]}),
}
"""Per objective two configurations near the best of the first round; they and the best go into the second round."""


def with_levels(options: Options) -> Options:
    """Return FiberPO's options with gates on prompt groups and domains too, which take the trajectories' budgets."""
    budget = options.get("budgets", DEFAULT_BUDGETS)["trajectory"]
    return {**options, "levels": DOMAIN_LEVELS, "budgets": {level: budget for (level,) in DOMAIN_LEVELS}}


def text_of(options: Options) -> str:
    """Return options as one line, the same for the same options."""
    return json.dumps(options, sort_keys=True, separators=(",", ":"))
