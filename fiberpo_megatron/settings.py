"""What all sections of the config have in common. The sections stand beside what they configure; `config/` joins them.

Nothing here or in a module named `settings` imports torch: a config can be loaded and checked on a login node.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """The base of all sections: frozen, unknown keys and numbers that are not finite are refused, and the docstring
    under a field becomes its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class PluginConfig(Section):
    """A plug-in with its options. A string alone stands for `{use = "..."}`."""

    use: str = Field(min_length=1)
    """A short name, or the import path of a class (`package.module:Class`; the current folder is importable)."""
    options: dict[str, Any] = {}
    """Arguments of the class. They are checked before anything starts."""
    version: str | None = None
    """Package and version that the run was started with; written by the run. With another one it does not resume."""


def as_plugin(value: object) -> object:
    """For a `mode="before"` validator: turn a string into the table that it stands for."""
    return {"use": value} if isinstance(value, str) else value
