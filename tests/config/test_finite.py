"""Numbers that are not finite are refused in every setting, at every depth, also in the options of plug-ins."""

import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from fiberpo_megatron.config import Config

Place = tuple[str | int, ...]
NUMBERS = [float("nan"), float("inf"), float("-inf")]
REQUIRED = {"model": {"path": "somewhere"}, "environments": [{"name": "sums", "use": "chat"}]}


def places(kind: Any, at: Place = ()) -> Iterator[Place]:
    """Yield the places below `at` where a setting of type `kind` may hold a float."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is float:
        yield at
    elif kind is Any:
        yield at
        yield (*at, "inner", 1)
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield from places(field.annotation, (*at, name))
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from places(argument, at)
    elif origin is typing.Annotated:
        yield from places(arguments[0], at)
    elif origin is dict:
        yield from places(arguments[1], (*at, "key"))
    elif origin is tuple and arguments[-1] is not Ellipsis:
        for index, argument in enumerate(arguments):
            yield from places(argument, (*at, index))
    elif origin in (list, tuple):
        yield from places(arguments[0], (*at, 0))


def nested(place: Place, number: float, default: Any) -> Any:
    """Return `default` with `number` put at `place`; lists before it are filled with 0.5."""
    if not place:
        return number
    first, *rest = place
    if isinstance(first, int):
        values = list(default) if isinstance(default, list) else [0.5] * 2
        return [*values[:first], nested(tuple(rest), number, (values[first:] or [None])[0]), *values[first + 1 :]]
    values = dict(default) if isinstance(default, dict) else {}
    return values | {first: nested(tuple(rest), number, values.get(first))}


PLACES = sorted(set(places(Config)), key=str)


def test_the_walk_finds_plain_and_nested_settings():
    assert len(PLACES) > 30
    assert ("optimizer", "learning_rate") in PLACES
    assert ("environments", 0, "weight") in PLACES
    assert ("environments", 0, "options", "key", "inner", 1) in PLACES
    assert len({place[0] for place in PLACES}) >= 8


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_number_that_is_not_finite_is_refused(place: Place):
    for number in NUMBERS:
        with pytest.raises(ValidationError, match="finite") as raised:
            Config.model_validate(nested(place, number, REQUIRED))
        assert any(error["loc"][:2] == place[:2] for error in raised.value.errors())


@pytest.mark.parametrize(
    "section",
    [
        {"optimizer": {"learning_rate": float("inf")}},
        {"algorithm": {"epsilon": float("nan")}},
        {"algorithm": {"epsilon": [0.1, float("nan")]}},
        {"algorithm": {"budgets": {"trajectory": [float("inf"), 0.1]}}},
    ],
    ids=["learning rate", "epsilon", "epsilon pair", "budgets"],
)
def test_the_short_forms_refuse_it_too(section: dict[str, Any]):
    with pytest.raises(ValidationError, match="finite"):
        Config.model_validate(REQUIRED | section)
