"""Read budgets: a pair (C+, C-) for a level, or pairs by the ids of one key, so that its nodes have budgets of their
own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fiberpo_megatron.fibration.options import pair

Budget = tuple[float, float]
Names = Mapping[str, Mapping[str, int]]
"""Per key, names of its ids."""
BY, OTHERS = "by", "*"
"""In a table by the ids of a key: the entry that names the key, and the one for all ids that are not listed."""


@dataclass(frozen=True)
class LevelBudget:
    """Holds the budgets (C+, C-) of the nodes of one level: one for all, or some by the id of the key `by`."""

    others: Budget
    """Budget of every node whose id is not in `of_id`."""
    by: str | None = None
    of_id: Mapping[int, Budget] = field(default_factory=dict)

    @property
    def all(self) -> Iterator[Budget]:
        """Yield every budget."""
        yield self.others
        yield from self.of_id.values()

    def table(self, size: int, labels: Tensor | None) -> Tensor:
        """Return C+ and C- of each of the `size` ids of the key `by`: float64 [2, size], on the host.

        `labels` [size] are the numbers that `of_id` means, where they are not the ids themselves.
        """
        table = torch.tensor(self.others, dtype=torch.float64).unsqueeze(1).repeat(1, size)
        for number, budget in self.of_id.items():
            at = slice(number, number + 1) if labels is None else labels == number
            table[:, at] = torch.tensor(budget, dtype=torch.float64).unsqueeze(1)
        return table


def read_budget(
    name: str, level: Sequence[str], coarser: Sequence[str], given: Any, default: Budget | None, names: Names
) -> LevelBudget:
    """Return the budgets of one level as `budgets[name]` gives them.

    Args:
        name: the level's name.
        level: its keys.
        coarser: the keys of the coarser levels of its chain.
        given: a pair, or a table {"by": key, "*": pair, id or name: pair, ...}.
        default: the level's budget where a table has no entry "*"; None for a level without a default.
        names: names of ids, by key.

    Raises:
        ValueError: a key that is not the level's or a coarser one's, an id that is unknown, or a budget that is not a
            pair of positive numbers; names level, value and fix.
    """
    where = f"budgets[{name!r}]"
    if not isinstance(given, Mapping):
        return LevelBudget(check_budget(name, pair(where, given)))
    by, values = keyed(where, given)
    known = list(dict.fromkeys((*level, *coarser)))
    if by is None and len(level) > 1:
        raise ValueError(f"{where} does not say whose ids it lists; add {BY!r}, one of the keys {known}")
    by = by or level[0]
    if by not in known:
        raise ValueError(
            f"{where} has {BY!r} = {by!r}, which is no key of level {name!r} or of a coarser level of its chain; "
            f"choose one of {known}"
        )
    others = values.pop(OTHERS, default)
    if others is None:
        raise ValueError(f"{where} has no entry {OTHERS!r}, and level {name!r} has no default; add {OTHERS!r}")
    of_id: dict[int, Budget] = {}
    for value, budget in values.items():
        number = id_of(by, value, names, where)
        if number in of_id:
            raise ValueError(f"{where} lists {by} {value!r} twice, by its name and by its number; keep one of them")
        label = f"{name} ({by} {value})"
        of_id[number] = check_budget(label, pair(f"{where}[{value!r}]", budget))
    return LevelBudget(check_budget(name, pair(f"{where}[{OTHERS!r}]", others)), by, of_id)


def keyed(where: str, given: Mapping[Any, Any]) -> tuple[str | None, dict[Any, Any]]:
    """Return the key whose ids a table lists (None if it does not say), and the table without that entry."""
    values = dict(given)
    by = values.pop(BY, None)
    if by is not None and not isinstance(by, str):
        raise ValueError(f"{where}[{BY!r}] is {by!r}; name a key, such as 'domain'")
    return by, values


def id_of(key: str, value: Any, names: Names, where: str) -> int:
    """Return the id of `key` that `value`, a name or a number, stands for.

    A file of settings has only texts for the entries of a table, so that a text of digits is a number. Raises
    ValueError for a name that is not among `names`, and for what is no whole number from 0.
    """
    known = names.get(key)
    if known is not None and value in known:
        return known[value]
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
    if whole and (known is None or number in known.values()):
        return int(number)
    choices = f"the names of {key} are {', '.join(map(repr, known))}" if known else f"ids of {key} are numbers from 0"
    raise ValueError(
        f"{where} has an entry for {key} {value!r}, which is unknown; {choices}, and {OTHERS!r} is for all others"
    )


def name_of(key: str, number: int, names: Names) -> str:
    """Return the name of an id, or its number where it has none."""
    return next((name for name, of in names.get(key, {}).items() if of == number), str(number))


def check_names(names: Names) -> None:
    """Raise ValueError for a name that could be mistaken for an id or for another entry of a table."""
    for key, known in names.items():
        for name, number in known.items():
            if name in (BY, OTHERS) or (name.isdecimal() and int(name) != number):
                raise ValueError(
                    f"{key} {number} has the name {name!r}, which budgets and levels by {key} cannot tell from "
                    f"{'an id' if name.isdecimal() else 'their entry of that name'}; choose another name"
                )


def check_budget(name: str, budget: Budget) -> Budget:
    """Return a level's (C+, C-). Raises ValueError unless both are positive and finite."""
    plus, minus = budget
    for label, value in (("C_plus", plus), ("C_minus", minus)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{label} of level {name!r} is {value}; a budget must be positive and finite")
    return plus, minus
