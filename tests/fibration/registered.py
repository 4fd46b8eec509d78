"""The names that tests of every objective run over: the package's own, and two that only these tests register.

A test that is parametrised over NAMES checks a new objective without a line about it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fiberpo_megatron.fibration import GSPO, Objective, build_objective, register, registered_names
from tests.fibration.topr import TOPR

__all__ = ["NAMES", "TOPR", "TurnGSPO", "tight"]


@register("gspo-turn")
@dataclass(frozen=True)
class TurnGSPO(GSPO):
    """Is GSPO with one ratio per turn of a conversation."""

    base_keys = ("turn",)


NAMES = registered_names()

TIGHT_BUDGET = (0.1, 0.08)


def tight(name: str, *, soft: bool = True) -> Objective:
    """Return an objective whose gates and clips are active on `random_case`."""
    levels = build_objective(name).level_names
    if levels:
        membership = ("soft" if soft else "hard") if "expert" in name else None
        return build_objective(
            name, epsilon=0.1, budgets=dict.fromkeys(levels, TIGHT_BUDGET), expert_membership=membership
        )
    if name in ("apc", "apc-trajectory"):
        return build_objective(name, budgets={"state" if name == "apc" else "trajectory": (0.1, 0.1)})
    if name == "dppo":
        return build_objective(name, epsilon=0.03)
    return build_objective(name)
