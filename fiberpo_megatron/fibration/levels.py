"""Define the levels of a fibration: which keys name a node, how levels nest or form a tree, their budgets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiberpo_megatron.fibration.budgets import (
    BY,
    OTHERS,
    Budget,
    LevelBudget,
    Names,
    id_of,
    keyed,
    name_of,
    read_budget,
)

EXPERT_KEY = "expert"
TRAJECTORY_KEY = "trajectory"
TURN_KEY = "turn"
STATE_KEY = "state"
"""Prompt and tokens before a token; -1 where the mini-batch has no other token after the same ones."""
WITHIN_TRAJECTORY = frozenset((TRAJECTORY_KEY, TURN_KEY))
"""Keys each of whose ids belongs to one trajectory. A weight version, an engine or a domain spans several."""

Chain = tuple[tuple[str, ...], ...]
"""Keys of the levels of a chain, fine to coarse."""


@dataclass(frozen=True)
class Level:
    """Holds one level: its keys and its budgets (C+, C-) of equation 4 of arXiv:2604.03044."""

    name: str
    """The keys joined by "+"; in a tree "BRANCH:KEYS" where not all branches have the level."""
    keys: tuple[str, ...]
    budget: LevelBudget
    parent: int | None
    """Place of the next coarser level in the tree; None at a root."""


@dataclass(frozen=True)
class Branch:
    """Holds one chain of a tree: the table of its finest nodes is a part of its own in what crosses ranks."""

    levels: tuple[int, ...]
    """Places of its levels in the tree, fine to coarse."""
    base_keys: tuple[str, ...]
    """Keys of the finest level that index tokens (all but the expert partition)."""
    parent_keys: tuple[str, ...]
    """Keys that only coarser levels name; a finest node must determine them."""
    uses_experts: bool


@dataclass(frozen=True)
class Choice:
    """Says which branch of a tree a token follows, by its id of one key."""

    key: str
    of_id: Mapping[int, int]
    others: int | None
    """Branch of all other ids; None if they have none."""


@dataclass(frozen=True)
class LevelTree:
    """Holds the levels of a chain, or of a tree of chains that share coarse levels (arXiv:2603.08239, remark 6.5)."""

    levels: tuple[Level, ...]
    """Every level stands before its parent: fine to coarse in a chain."""
    branches: tuple[Branch, ...]
    """The different chains; one without a tree."""
    choice: Choice | None
    """None if all tokens follow one chain."""
    soft: bool

    @property
    def uses_experts(self) -> bool:
        return any(branch.uses_experts for branch in self.branches)

    @property
    def base_keys(self) -> tuple[str, ...]:
        """Return the keys of the finest levels that index tokens."""
        return tuple(dict.fromkeys(key for branch in self.branches for key in branch.base_keys))

    @property
    def parent_keys(self) -> tuple[str, ...]:
        """Return the keys of some branch that only its coarser levels name."""
        return tuple(dict.fromkeys(key for branch in self.branches for key in branch.parent_keys))

    @property
    def inside_trajectory(self) -> bool:
        """Return whether no node of any level spans two trajectories."""
        return all(inside_trajectory(level.keys) for level in self.levels)

    def members(self, place: int) -> tuple[int, ...]:
        """Return the branches that have the level at `place`."""
        return tuple(at for at, branch in enumerate(self.branches) if place in branch.levels)

    def listed(self) -> dict[str, set[int]]:
        """Return, by key, the ids for which there is a budget or a branch of their own."""
        found: dict[str, set[int]] = {}
        if self.choice is not None:
            found[self.choice.key] = set(self.choice.of_id)
        for level in self.levels:
            if level.budget.by is not None:
                found.setdefault(level.budget.by, set()).update(level.budget.of_id)
        return found


def inside_trajectory(keys: Sequence[str]) -> bool:
    """Return whether a node that these keys name lies inside one trajectory, and so inside one micro-batch."""
    return not WITHIN_TRAJECTORY.isdisjoint(keys)


def level_name(keys: Sequence[str]) -> str:
    """Return a level's name: its keys joined by "+"."""
    return "+".join(keys)


def make_tree(
    levels: Sequence[Sequence[str]] | Mapping[str, Any],
    budgets: Mapping[str, Any] | None,
    *,
    defaults: Mapping[str, Budget],
    names: Names,
    soft: bool,
) -> LevelTree:
    """Return the checked chain or tree of levels.

    Args:
        levels: a chain, or a table {"by": key, "*": chain, id or name: chain, ...}.
        budgets: by the level's name its pair (C+, C-), or a table of pairs (`budgets.read_budget`); a level that is
            not listed takes its default.
        defaults: budgets by the level's keys, joined by "+".
        names: names of ids, by key.
        soft: whether tokens belong to expert partitions by their shares.

    Raises:
        ValueError: levels that cannot nest, or budgets that do not fit them; names level, value and fix.
    """
    by, chains = _chains(levels, names)
    titles = _titles(chains)
    order = list(titles)
    _check_names([title for title, _ in titles.values()], budgets)
    found = []
    for identity, (title, (keys, *coarser)) in titles.items():
        default = defaults.get(level_name(keys))
        given = (budgets or {}).get(title, default)
        if given is None:
            raise ValueError(f"level {title!r} has no budget; add budgets[{title!r}] = (C_plus, C_minus)")
        budget = read_budget(title, keys, [key for level in coarser for key in level], given, default, names)
        found.append(Level(title, keys, budget, order.index(identity[1:]) if coarser else None))
    different = {_identity(chain): chain for _, _, chain in chains}
    branches = tuple(_branch(chain, order) for chain in different.values())
    choice = None
    if by is not None:
        of_id = {number: list(different).index(_identity(chain)) for number, _, chain in chains}
        others = of_id.pop(None, None)
        if len(branches) > 1 or others is None:
            choice = Choice(by, {number: at for number, at in of_id.items() if number is not None}, others)
    return LevelTree(tuple(found), branches, choice, soft)


def level_titles(levels: Sequence[Sequence[str]] | Mapping[str, Any], names: Names) -> dict[str, tuple[str, ...]]:
    """Return the keys of every level of a chain or tree, by the name by which budgets call it.

    Raises ValueError as `make_tree` does, budgets apart.
    """
    return {title: chain[0] for title, chain in _titles(_chains(levels, names)[1]).values()}


_Chains = list[tuple[int | None, str, Chain]]
"""Id that follows the chain (None: all others), its name, and the chain."""
_Identity = tuple[frozenset[str], ...]


def _identity(chain: Chain) -> _Identity:
    """What makes two levels the same: equal keys, in any order, here and at all coarser levels."""
    return tuple(frozenset(level) for level in chain)


def _chains(levels: Any, names: Names) -> tuple[str | None, _Chains]:
    if not isinstance(levels, Mapping):
        return None, [(None, OTHERS, check_levels(levels))]
    by, given = keyed("levels", levels)
    if by is None or by in (EXPERT_KEY, STATE_KEY):
        raise ValueError(
            f"levels has {BY!r} = {by!r}; a tree needs a key of which every token has one id, such as {BY!r} = 'domain'"
        )
    if not given:
        raise ValueError(f"levels by {by!r} holds no chain; add {OTHERS!r} with a list of levels")
    chains: _Chains = []
    for value, chain in given.items():
        number = None if value == OTHERS else id_of(by, value, names, "levels")
        if number in [other for other, _, _ in chains]:
            raise ValueError(f"levels lists {by} {value!r} twice, by its name and by its number; keep one of them")
        label = OTHERS if number is None else name_of(by, number, names)
        chains.append((number, label, check_levels(chain)))
    return by, chains


def _titles(chains: _Chains) -> dict[_Identity, tuple[str, Chain]]:
    """Every level's name, and its part of a chain from it on; a level's parent is the shorter one."""
    suffixes = {_identity(chain[at:]): chain[at:] for _, _, chain in chains for at in range(len(chain))}
    order = sorted(suffixes, key=len, reverse=True)
    return {identity: (_title(identity, chains), suffixes[identity]) for identity in order}


def _title(identity: _Identity, chains: _Chains) -> str:
    users = [(label, chain) for _, label, chain in chains if _identity(chain)[-len(identity) :] == identity]
    name = level_name(users[0][1][-len(identity)])
    return name if len(users) == len(chains) else f"{','.join(label for label, _ in users)}:{name}"


def _check_names(titles: Sequence[str], budgets: Mapping[str, Any] | None) -> None:
    unknown = sorted(set(budgets or ()) - set(titles), key=str)
    if unknown:
        raise ValueError(f"budgets name levels {unknown} which the objective does not have; its levels are {titles}")


def _branch(chain: Chain, order: Sequence[_Identity]) -> Branch:
    identity = _identity(chain)
    coarser = dict.fromkeys(key for level in chain[1:] for key in level)
    return Branch(
        levels=tuple(order.index(identity[at:]) for at in range(len(chain))),
        base_keys=tuple(key for key in chain[0] if key != EXPERT_KEY),
        parent_keys=tuple(key for key in coarser if key not in chain[0]),
        uses_experts=EXPERT_KEY in chain[0],
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
