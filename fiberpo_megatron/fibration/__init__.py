"""Compute objectives and their closed-form gradients, with node sums that cross ranks.

    from fiberpo_megatron.fibration import build_objective

    objective = build_objective("grpo", epsilon=0.1)
    out = objective(log_ratio, advantages, weights)  # flat tensors [N] of response tokens
    (-(out.gradient * log_probs).sum()).backward()

A custom objective is one class that derives from `TokenObjective` or `Objective`: docs/fibration.md shows it.

Sources: Fibration Policy Optimization (arXiv:2603.08239) and JoyAI-LLM Flash (arXiv:2604.03044, section
3.3). `docs/fibration.md` says which parts are theirs and which are this project's.
"""

from fiberpo_megatron.fibration.amplification import Amplification
from fiberpo_megatron.fibration.collective import Reduce
from fiberpo_megatron.fibration.evaluate import ObjectiveOutput
from fiberpo_megatron.fibration.fiber import (
    DEFAULT_BUDGETS,
    FiberPO,
    FiberPODomain,
    FiberPOExpert,
    FiberPOExpertGlobal,
)
from fiberpo_megatron.fibration.importance import ImportanceWeights, LevelBounds, importance_weights
from fiberpo_megatron.fibration.objective import Objective, TokenObjective
from fiberpo_megatron.fibration.objective_metrics import ObjectiveMetrics
from fiberpo_megatron.fibration.options import Advice, Option
from fiberpo_megatron.fibration.registry import (
    build_objective,
    objective_class,
    objective_options,
    register,
    registered_names,
)
from fiberpo_megatron.fibration.rule import WEIGHTINGS, Chunk, Clip, GatedChunk, Gating
from fiberpo_megatron.fibration.sequence import APC, GMPO, GSPO, APCTrajectory
from fiberpo_megatron.fibration.token_clip import CISPO, DAPO, GRPO, PPO, RLOO, DrGRPO, Reinforce, ReinforcePlusPlus
from fiberpo_megatron.fibration.token_gates import DPPO, SAPO

OBJECTIVES = registered_names()
"""Short names of this package's own objectives; `registered_names()` adds those that others registered."""

PRESET_LEVELS: dict[str, tuple[tuple[str, ...], ...]] = {
    cls.name: cls.default_levels for cls in (FiberPO, FiberPODomain, FiberPOExpert, FiberPOExpertGlobal)
}
"""Levels of the fibred objectives, fine to coarse."""

__all__ = [
    "APC",
    "APCTrajectory",
    "Advice",
    "Amplification",
    "CISPO",
    "DAPO",
    "DEFAULT_BUDGETS",
    "DPPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "OBJECTIVES",
    "PPO",
    "PRESET_LEVELS",
    "RLOO",
    "SAPO",
    "WEIGHTINGS",
    "Chunk",
    "Clip",
    "DrGRPO",
    "FiberPO",
    "FiberPODomain",
    "FiberPOExpert",
    "FiberPOExpertGlobal",
    "GatedChunk",
    "Gating",
    "ImportanceWeights",
    "LevelBounds",
    "Objective",
    "ObjectiveMetrics",
    "ObjectiveOutput",
    "Option",
    "Reduce",
    "Reinforce",
    "ReinforcePlusPlus",
    "TokenObjective",
    "build_objective",
    "importance_weights",
    "objective_class",
    "objective_options",
    "register",
    "registered_names",
]
