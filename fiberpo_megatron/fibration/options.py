"""Read and check the options of an objective: the typed fields of its class, their checks, and their documentation."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

Epsilon = tuple[float, float]
"""(for positive, for non-positive advantage); for clips of a ratio this is (upper, lower)."""
Widths = float | Sequence[float] | Mapping[str, float]
"""What the option `epsilon` takes: one width, {"low": width, "high": width}, or a pair in the order of `Epsilon`."""

NOT_OPTIONS = ("kernels", "exact_sums")
"""Fields that say how a call runs, not what it computes."""


class Advice(NamedTuple):
    """Says what in an option is allowed but unwise."""

    option: str
    entry: str | None
    """The entry of the option that is meant, where the option is a table."""
    seen: Any
    """The value of the option, or of its entry."""
    text: str

    def __str__(self) -> str:
        """Return it as one line, as for an option in Python."""
        entry = "" if self.entry is None else f"[{self.entry!r}]"
        return f"{self.option}{entry} = {self.seen!r}: {self.text}"


class Option(NamedTuple):
    """Describes one option of an objective."""

    name: str
    type: str
    """The annotation as it is written in the class."""
    default: Any
    """`dataclasses.MISSING` for an option that must be given."""
    doc: str
    """The docstring below the field, or its `field(metadata={"doc": ...})`."""


def options_of(cls: type) -> list[Option]:
    """Return the options of an objective's class, in the order of its fields."""
    docs = _docstrings(cls)
    return [
        Option(
            field.name,
            field.type if isinstance(field.type, str) else inspect.formatannotation(field.type),
            field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default,
            " ".join((field.metadata.get("doc") or docs.get(field.name, "")).split()),
        )
        for field in _fields(cls)
    ]


def check_class(cls: type) -> None:
    """Raise ValueError for a class whose annotations look like options but whose `@dataclass` was forgotten."""
    for ancestor in cls.__mro__:
        if "__dataclass_fields__" in vars(ancestor) or ancestor.__module__.startswith("fiberpo_megatron.fibration"):
            continue
        names = [name for name, kind in inspect.get_annotations(ancestor).items() if not _is_class_variable(kind)]
        if names and any(base is not object for base in ancestor.__bases__):
            raise ValueError(
                f"{ancestor.__qualname__} declares the option {names[0]!r} but is not a dataclass; write "
                "@dataclass(frozen=True) above the class"
            )


def given_options(cls: type, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given: those that are not None, nor False where the objective lacks them.

    Raises ValueError for another option that the objective does not have, or for a missing one.
    """
    fields = {field.name: field for field in _fields(cls)}
    chosen = {option: value for option, value in given.items() if value is not None}
    chosen = {option: value for option, value in chosen.items() if value is not False or option in fields}
    for option in chosen:
        if option not in fields:
            reads = ", ".join(sorted(fields)) or "no option"
            raise ValueError(f"objective {name!r} does not read {option!r}; remove it ({name} reads {reads})")
    for option, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and option not in chosen:
            raise ValueError(f"objective {name!r} needs the option {option!r}; add it to its options")
    return chosen


def check_values(objective: Any) -> None:
    """Raise ValueError for an option of the wrong type, or with a number in it that is not finite."""
    cls: type = type(objective)
    hints = _hints(cls)
    for field in _fields(cls):
        value = getattr(objective, field.name)
        for number in _numbers(value):
            if not math.isfinite(number):
                raise ValueError(
                    f"objective {objective.name!r}: option {field.name!r} is {value!r}; its numbers must be finite"
                )
        if field.name in hints and not _fits(value, hints[field.name]):
            raise ValueError(
                f"objective {objective.name!r}: option {field.name!r} is {value!r}; {_choices(hints[field.name])}"
            )


def changed_options(objective: Any) -> dict[str, Any]:
    """Return the options of an objective that are not their defaults."""
    values = {field.name: (getattr(objective, field.name), field.default) for field in _fields(type(objective))}
    return {name: value for name, (value, default) in values.items() if value != default}


def pair(label: str, given: Any) -> tuple[float, float]:
    """Return two numbers as floats. Raises ValueError unless `given` is a sequence of two numbers."""
    values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(values) != 2 or not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{label} is {given!r}; pass a pair of numbers")
    return float(values[0]), float(values[1])


def epsilon_pair(given: Widths) -> Epsilon:
    """Return one number twice, {"low": ..., "high": ...} as (high, low), or a pair as it is.

    Raises ValueError for a table with other entries, and unless both widths are positive and finite.
    """
    if isinstance(given, Mapping):
        if set(given) != {"low", "high"}:
            raise ValueError(f"epsilon is {dict(given)}; write both widths, as in {{low = 0.2, high = 0.28}}")
        high, low = pair("epsilon", (given["high"], given["low"]))
    elif isinstance(given, int | float):
        high = low = float(given)
    else:
        high, low = pair("epsilon", given)
    if not (0.0 < high < math.inf and 0.0 < low < math.inf):
        raise ValueError(f"epsilon is {(high, low)}; both values must be positive and finite")
    return high, low


def epsilon_advice(given: Mapping[str, Any], default: Widths) -> list[Advice]:
    """Return the advice to name the two widths, where the options that were given hold `epsilon` as a bare pair that is
    not the default."""
    epsilon = given.get("epsilon")
    if not isinstance(epsilon, list | tuple) or len(epsilon) != 2 or tuple(epsilon) == default:
        return []
    high, low = epsilon
    text = f"a pair is (high, low), the width for positive advantages first; write {{low = {low}, high = {high}}}"
    return [Advice("epsilon", None, epsilon, text)]


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init and field.name not in NOT_OPTIONS]


def _is_class_variable(annotation: Any) -> bool:
    text = annotation if isinstance(annotation, str) else ""
    return text.startswith(("ClassVar", "typing.ClassVar")) or ClassVar in (annotation, get_origin(annotation))


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # the annotations name a type that is imported for type checkers only
        return {}


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Real):
        yield float(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)


def _fits(value: Any, hint: Any) -> bool:
    """Compare the outermost type only: what a container holds is checked by the objective, which names the fix."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    kind = origin or hint
    if kind is None or kind is NoneType:
        return value is None
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (tuple, list, Sequence):  # a config's file has lists only
        return isinstance(value, list | tuple)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _choices(hint: Any) -> str:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    if literals:
        return f"choose {' or '.join(map(repr, literals))}"
    return f"its type is {inspect.formatannotation(hint)}"


def _docstrings(cls: type) -> dict[str, str]:
    """Return the string below each annotated field of a class and of its bases."""
    found: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(ancestor))
        except (OSError, TypeError):  # a class that was typed into a shell has no source
            continue
        (node,) = ast.parse(source).body
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, below in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[field.target.id] = text.value
    return found
