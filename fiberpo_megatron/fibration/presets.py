"""`build_objective`: every objective by name, its default budgets, and the options it reads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from fiberpo_megatron.fibration.fiber import FiberRule, Overlays
from fiberpo_megatron.fibration.levels import (
    TRAJECTORY_KEY,
    Budget,
    check_budget,
    check_levels,
    level_name,
    make_chain,
    warn_wide_epsilon,
)
from fiberpo_megatron.fibration.objective import Objective
from fiberpo_megatron.fibration.rule import Epsilon, Rule
from fiberpo_megatron.fibration.sequence import APCRule, GSPORule
from fiberpo_megatron.fibration.token_clip import CISPORule, PPORule, ReinforceRule

PRESET_LEVELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "fiberpo": (("trajectory",),),
    "fiberpo-domain": (("trajectory",), ("prompt_group",), ("domain",)),
    "fiberpo-expert": (("trajectory", "expert"), ("trajectory",), ("prompt_group",), ("domain",)),
    "fiberpo-expert-global": (
        ("trajectory", "expert"),
        ("prompt_group", "expert"),
        ("domain", "expert"),
        ("expert",),
    ),
}

DEFAULT_BUDGETS: dict[str, Budget] = {
    "trajectory+expert": (0.12, 0.10),
    "trajectory": (0.12, 0.10),
    "prompt_group": (0.08, 0.06),
    "prompt_group+expert": (0.08, 0.06),
    "domain": (0.06, 0.05),
    "domain+expert": (0.06, 0.05),
    "expert": (0.06, 0.05),
}
"""(C+, C-) per level name, in mean |log ratio|: a choice of this project, see docs/fibration.md."""

APC_BUDGET: Budget = (0.12, 0.10)
"""APC-Obj's delta is C+ + C- of its one budget, "trajectory"."""

DEFAULT_EPSILON: dict[str, Epsilon] = {
    "fiberpo": (0.05, 0.05),
    "fiberpo-domain": (0.05, 0.05),
    "fiberpo-expert": (0.05, 0.05),
    "fiberpo-expert-global": (0.05, 0.05),
    "ppo": (0.2, 0.2),  # arXiv:1707.06347, section 6.1
    "grpo": (0.2, 0.2),
    "dapo": (0.28, 0.2),  # arXiv:2503.14476, section 4.1
    "gspo": (4e-4, 3e-4),  # arXiv:2507.18071, section 5.1
    "cispo": (4.0, 1.0),  # no lower bound, as in arXiv:2506.13585, section 3; the upper bound 5 is our choice
}


@dataclass(frozen=True)
class _Options:
    """Options as given; None (or False) means not given."""

    epsilon: float | Sequence[float] | None
    epsilon_high: float | None
    budgets: Mapping[str, Sequence[float]] | None
    expert_membership: str | None
    levels: Sequence[Sequence[str]] | None
    dual_clip: float | None
    unclip_positive: bool


_FIBER_READS = frozenset(("epsilon", "budgets", "expert_membership", "levels", "dual_clip", "unclip_positive"))
_READS: dict[str, frozenset[str]] = {
    **dict.fromkeys(PRESET_LEVELS, _FIBER_READS),
    **{name: frozenset(("epsilon", "epsilon_high", "dual_clip")) for name in ("ppo", "grpo", "dapo")},
    **{name: frozenset(("epsilon", "epsilon_high")) for name in ("gspo", "cispo")},
    "apc": frozenset(("budgets",)),
    "reinforce": frozenset(),
}

OBJECTIVES: tuple[str, ...] = tuple(_READS)
"""Names `build_objective` knows."""


def build_objective(
    name: str,
    *,
    epsilon: float | Sequence[float] | None = None,
    epsilon_high: float | None = None,
    budgets: Mapping[str, Sequence[float]] | None = None,
    expert_membership: str | None = None,
    levels: Sequence[Sequence[str]] | None = None,
    dual_clip: float | None = None,
    unclip_positive: bool = False,
) -> Objective:
    """An objective by name.

    Args:
        name: one of OBJECTIVES.
        epsilon: the token clip; one number, or (for positive, for non-positive advantage). For the fibred
            objectives it bounds log ratios on both sides, and the pair picks by the advantage's sign. For
            ppo, grpo, dapo and gspo the pair is (upper, lower) bound of the ratio, which is the same thing
            under the pessimistic minimum; for cispo it is (upper, lower).
        epsilon_high: the upper bound for ppo, grpo, dapo, gspo and cispo; `epsilon` is then the lower one.
        budgets: per level name (keys joined by "+") the pair (C+, C-); must name exactly the levels. apc
            reads budgets["trajectory"], with delta = C+ + C-.
        expert_membership: "soft" (default) or "hard", for chains with the key "expert".
        levels: a nested chain of keys, fine to coarse, in place of the preset's; fibred objectives only.
        dual_clip: c > 1; tokens with A < 0 and x > 0 use max(r A, c A).
        unclip_positive: tokens with A > 0 and x < 0 use r A; fibred objectives only.

    Raises:
        ValueError: unknown name, an option this objective does not read, or a bad value; names the fix.
    """
    if name not in _READS:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
    options = _Options(epsilon, epsilon_high, budgets, expert_membership, levels, dual_clip, unclip_positive)
    for field in fields(options):
        value = getattr(options, field.name)
        if value is not None and value is not False and field.name not in _READS[name]:
            reads = ", ".join(sorted(_READS[name])) or "no option"
            raise ValueError(f"objective {name!r} does not read {field.name!r}; remove it ({name} reads {reads})")
    return Objective(name, _rule(name, options))


def _rule(name: str, options: _Options) -> Rule:
    if options.dual_clip is not None and not 1.0 < options.dual_clip < float("inf"):
        raise ValueError(f"dual_clip is {options.dual_clip}; it bounds the ratio of bad tokens and must be above 1")
    if name in PRESET_LEVELS:
        return _fiber_rule(name, options)
    if name == "apc":
        return APCRule(sum(_apc_budget(options.budgets)))
    if name == "reinforce":
        return ReinforceRule()
    epsilon = _epsilon(name, options)
    if epsilon[1] > 1.0 or (name != "cispo" and epsilon[1] == 1.0):
        raise ValueError(f"epsilon's lower bound is {epsilon[1]}; 1 - epsilon must stay a positive ratio")
    if name == "gspo":
        return GSPORule(epsilon)
    if name == "cispo":
        return CISPORule(epsilon)
    return PPORule(epsilon, options.dual_clip)


def _fiber_rule(name: str, options: _Options) -> FiberRule:
    levels = check_levels(options.levels if options.levels is not None else PRESET_LEVELS[name])
    membership = options.expert_membership
    if membership not in (None, "soft", "hard"):
        raise ValueError(f"expert_membership is {membership!r}; choose 'soft' or 'hard'")
    given = options.budgets
    if given is None:
        known = {level_name(level): DEFAULT_BUDGETS.get(level_name(level)) for level in levels}
        budgets = {level: budget for level, budget in known.items() if budget is not None}
    else:
        budgets = {level: _pair(f"budgets[{level!r}]", pair) for level, pair in given.items()}
    chain = make_chain(levels, budgets, soft=membership != "hard")
    if membership is not None and not chain.uses_experts:
        raise ValueError(
            f"objective {name!r} has no level with the key 'expert' and does not read 'expert_membership'; "
            "remove it, or add 'expert' to a level"
        )
    epsilon = _epsilon(name, options)
    warn_wide_epsilon(chain, epsilon)
    return FiberRule(chain, epsilon, Overlays(options.dual_clip, options.unclip_positive))


def _epsilon(name: str, options: _Options) -> Epsilon:
    given = options.epsilon
    if options.epsilon_high is not None:
        if given is not None and not isinstance(given, int | float):
            raise ValueError(f"epsilon is the pair {tuple(given)} and epsilon_high is also given; pass one of the two")
        pair = (options.epsilon_high, DEFAULT_EPSILON[name][1] if given is None else given)
    elif given is None:
        pair = DEFAULT_EPSILON[name]
    elif isinstance(given, int | float):
        pair = (float(given), float(given))
    else:
        pair = _pair("epsilon", given)
    high, low = float(pair[0]), float(pair[1])
    if not (0.0 < high < float("inf") and 0.0 < low < float("inf")):
        raise ValueError(f"epsilon is {(high, low)}; both values must be positive and finite")
    return high, low


def _pair(label: str, given: Sequence[float]) -> tuple[float, float]:
    values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(values) != 2:
        raise ValueError(f"{label} is {given!r}; pass a pair of numbers")
    return float(values[0]), float(values[1])


def _apc_budget(given: Mapping[str, Sequence[float]] | None) -> Budget:
    if given is None:
        return APC_BUDGET
    if set(given) != {TRAJECTORY_KEY}:
        raise ValueError(f"objective 'apc' reads exactly budgets['trajectory']; got {sorted(given)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only the sum counts here
        return check_budget(TRAJECTORY_KEY, _pair("budgets['trajectory']", given[TRAJECTORY_KEY]))
