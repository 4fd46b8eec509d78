"""This module turns a TOML file and dotted overrides into a Config, with messages that a person can act on."""

import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fiberpo_megatron.config.renamed import translated
from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.settings import PluginConfig


class ConfigError(ValueError):
    """The configuration cannot be used; the message says what is wrong, the value seen and the fix."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` and apply overrides given as ["--section.key", "value", "--other.key=value", ...].

    Relative paths inside are relative to the current folder. Raises ConfigError.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist (current folder: {Path.cwd()})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config file {path} cannot be read as TOML: {error}") from error
    for key, value in _pairs(overrides):
        _put(values, key.split("."), value, key)
    try:
        return Config.model_validate(translated(values, path))
    except ValidationError as error:
        raise ConfigError(_explain(path, error)) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def dump_config(config: Config) -> str:
    """Return the resolved config as TOML that `load_config` reads back to an equal Config (unset values are left
    out)."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    words = list(overrides)
    pairs = []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{word!r} is not an override; write --section.key value, e.g. --parallel.tensor 2")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = words.pop(0)
        pairs.append((key, _value(value)))
    return pairs


def _value(text: str) -> Any:
    """A TOML value where it is one (numbers, true, lists), else the string itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _put(values: Any, keys: list[str], value: Any, whole: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        if (
            isinstance(values, dict)
            and isinstance(values.get(key), str)
            and keys[depth + 1] in PluginConfig.model_fields
        ):
            values[key] = {"use": values[key]}  # a plug-in's name alone stands for this table
        values = values[_index(values, key, whole)] if isinstance(values, list) else values.setdefault(key, {})
        if not isinstance(values, (dict, list)):
            raise ConfigError(f"--{whole}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    if isinstance(values, list):
        values[_index(values, keys[-1], whole)] = value
    else:
        values[keys[-1]] = value


def _index(values: list[Any], key: str, whole: str) -> int:
    if not key.isdigit() or int(key) >= len(values):
        raise ConfigError(f"--{whole}: {key!r} is not an index of a list of {len(values)} entries (0 is the first)")
    return int(key)


def _explain(path: Path, error: ValidationError) -> str:
    lines = [f"{path}: {error.error_count()} problem(s) in the configuration"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {where}: unknown key{_suggestion(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"  {where}: is required and not set")
        else:
            seen = "" if isinstance(problem["input"], dict) else f" (value seen: {problem['input']!r})"
            lines.append(f"  {where or 'config'}: {problem['msg'].removeprefix('Value error, ')}{seen}")
    return "\n".join(lines)


def _suggestion(location: tuple[str | int, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        if isinstance(part, str) and isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(part)
            section = _section_of(field.annotation) if field else None
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return ""
    names = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(names)}"


def _section_of(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((a for a in typing.get_args(annotation) if isinstance(a, type)), None)
    return annotation
