"""This module holds what all sections of the config have in common. The sections stand beside what they configure;
`config/` joins them.

Nothing here or in a module named `settings` imports torch: a config can be loaded and checked on a login node.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer


class Section(BaseModel):
    """This is the base of all sections. They are frozen, refuse unknown keys and numbers that are not finite, and the
    docstring under a field becomes its description. Pydantic's own messages show no values, which may hold a secret."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class PluginConfig(Section):
    """This is a plug-in with its options. A string alone stands for `{use = "..."}`."""

    use: str = Field(min_length=1)
    """A short name, or the import path of a class (`package.module:Class`; the current folder is importable)."""
    options: dict[str, Any] = {}
    """Arguments of the class. They are checked before anything starts."""
    version: str | None = None
    """Package and version that the run was started with; written by the run. With another one it does not resume."""

    @field_validator("options")
    @classmethod
    def options_are_finite(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Refuse nan and inf at any depth; the class of the plug-in need not check this."""
        for where, value in _not_finite("options", options):
            raise ValueError(f"{where} = {value}: the number must be finite")
        return options

    @model_serializer(mode="wrap")
    def short_where_possible(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Write a name alone as a string."""
        if type(self) is PluginConfig and not self.options and self.version is None:
            return self.use
        return handler(self)


def as_plugin(value: object) -> object:
    """Return the table that a string stands for; other values stay as they are. Use it in a `mode="before"`
    validator."""
    return {"use": value} if isinstance(value, str) else value


def _not_finite(where: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(f"{where}.{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_finite(f"{where}.{index}", inner)
