"""Define the levels of a fibration: which keys name a node, how levels nest, and each level's budgets."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXPERT_KEY = "expert"
TRAJECTORY_KEY = "trajectory"
TURN_KEY = "turn"
STATE_KEY = "state"
"""Prompt and tokens before a token; -1 where the mini-batch has no other token after the same ones."""
WITHIN_TRAJECTORY = frozenset((TRAJECTORY_KEY, TURN_KEY))
"""Keys each of whose ids belongs to one trajectory. A weight version, an engine or a domain spans several."""

Budget = tuple[float, float]


@dataclass(frozen=True)
class Level:
    """Holds one level: its keys and its budgets (C+, C-) of equation 4 of arXiv:2604.03044."""

    keys: tuple[str, ...]
    budget: Budget

    @property
    def name(self) -> str:
        return level_name(self.keys)


@dataclass(frozen=True)
class LevelChain:
    """Holds levels from fine to coarse, together with the expert membership that they use."""

    levels: tuple[Level, ...]
    soft: bool

    @property
    def uses_experts(self) -> bool:
        return EXPERT_KEY in self.levels[0].keys

    @property
    def base_keys(self) -> tuple[str, ...]:
        """Return the keys of the finest level that index tokens (all but the expert partition)."""
        return tuple(key for key in self.levels[0].keys if key != EXPERT_KEY)

    @property
    def parent_keys(self) -> tuple[str, ...]:
        """Return the keys that only coarser levels name; a finest node must determine them."""
        known = set(self.levels[0].keys)
        found: dict[str, None] = {}
        for level in self.levels[1:]:
            found.update((key, None) for key in level.keys if key not in known)
        return tuple(found)

    @property
    def inside_trajectory(self) -> bool:
        """Return whether no node of any level spans two trajectories."""
        return all(inside_trajectory(level.keys) for level in self.levels)


def inside_trajectory(keys: Sequence[str]) -> bool:
    """Return whether a node that these keys name lies inside one trajectory, and so inside one micro-batch."""
    return not WITHIN_TRAJECTORY.isdisjoint(keys)


def level_name(keys: Sequence[str]) -> str:
    """Return a level's name: its keys joined by "+"."""
    return "+".join(keys)


def make_chain(levels: Sequence[Sequence[str]], budgets: Mapping[str, Budget], *, soft: bool) -> LevelChain:
    """Return the checked chain of levels; `budgets` maps every level's name to its (C+, C-)."""
    keys = check_levels(levels)
    names = [level_name(level) for level in keys]
    unknown = sorted(set(budgets) - set(names))
    if unknown:
        raise ValueError(f"budgets name levels {unknown} which the objective does not have; its levels are {names}")
    missing = [name for name in names if name not in budgets]
    if missing:
        raise ValueError(f"level {missing[0]!r} has no budget; add budgets[{missing[0]!r}] = (C_plus, C_minus)")
    return LevelChain(
        tuple(Level(level, check_budget(level_name(level), budgets[level_name(level)])) for level in keys),
        soft,
    )


def check_levels(levels: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Return the levels as tuples. Raises ValueError when a name is malformed or the expert key cannot nest."""
    if isinstance(levels, str) or not levels:
        raise ValueError(f"levels must be a non-empty list of lists of keys, fine to coarse; got {levels!r}")
    seen: dict[frozenset[str], str] = {}
    chain = []
    for level in levels:
        if isinstance(level, str) or not level or not all(isinstance(key, str) and key for key in level):
            raise ValueError(f"a level must be a non-empty list of key names such as ['trajectory']; got {level!r}")
        if len(set(level)) != len(level):
            raise ValueError(f"level {level_name(level)!r} names a key twice; name each key once")
        if STATE_KEY in level:
            raise ValueError(
                f"level {level_name(level)!r} has the key 'state', whose id of -1 stands for many states; only 'apc' "
                "reads it, so name another key"
            )
        if frozenset(level) in seen:
            raise ValueError(f"level {level_name(level)!r} occurs twice in the chain; keep one of them")
        seen[frozenset(level)] = level_name(level)
        chain.append(tuple(level))
    for fine, coarse in itertools.pairwise(chain):
        if EXPERT_KEY in coarse and EXPERT_KEY not in fine:
            raise ValueError(
                f"level {level_name(fine)!r} is not nested in {level_name(coarse)!r}: one node of the former "
                f"holds tokens of several expert partitions; add 'expert' to {level_name(fine)!r} or drop it "
                "from the other"
            )
    return tuple(chain)


def check_budget(name: str, budget: Budget) -> Budget:
    """Return a level's (C+, C-); warns when C- >= C+. Raises ValueError unless both are positive and finite."""
    try:
        plus, minus = (float(value) for value in budget)
    except (TypeError, ValueError):
        raise ValueError(f"the budget of level {name!r} must be a pair (C_plus, C_minus); got {budget!r}") from None
    for label, value in (("C_plus", plus), ("C_minus", minus)):
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{label} of level {name!r} is {value}; a budget must be positive and finite")
    if minus >= plus:
        warnings.warn(
            f"level {name!r} has C_minus {minus} >= C_plus {plus}: the negative channel's aggregate is the "
            "larger one (the KL bias), so C_minus < C_plus is recommended",
            stacklevel=2,
        )
    return plus, minus


def warn_wide_epsilon(chain: LevelChain, epsilon: Budget) -> None:
    """Warn unless the token clip is well below every level's delta = C+ + C- (at most half of it)."""
    for level in chain.levels:
        delta = sum(level.budget)
        if max(epsilon) > 0.5 * delta:
            warnings.warn(
                f"epsilon {max(epsilon)} is not well below level {level.name!r}'s delta {delta:g} (C_plus + "
                "C_minus): the token clip should be the finer control; lower epsilon to at most half of "
                "delta, or raise the level's budgets",
                stacklevel=2,
            )
