"""The fibration maths: objectives with closed-form gradients and node sums that cross ranks.

Sources: Fibration Policy Optimization (arXiv:2603.08239) and JoyAI-LLM Flash (arXiv:2604.03044, section
3.3). `docs/fibration.md` says which parts are theirs and which are this project's.
"""

from fiberpo_megatron.fibration.collective import Reduce
from fiberpo_megatron.fibration.evaluate import ObjectiveOutput
from fiberpo_megatron.fibration.objective import Objective
from fiberpo_megatron.fibration.objective_metrics import ObjectiveMetrics
from fiberpo_megatron.fibration.presets import (
    DEFAULT_BUDGETS,
    DEFAULT_EPSILON,
    OBJECTIVES,
    PRESET_LEVELS,
    build_objective,
)

__all__ = [
    "DEFAULT_BUDGETS",
    "DEFAULT_EPSILON",
    "OBJECTIVES",
    "PRESET_LEVELS",
    "Objective",
    "ObjectiveMetrics",
    "ObjectiveOutput",
    "Reduce",
    "build_objective",
]
