#!/usr/bin/env python3
"""Write docs/settings.md, the reference of all settings, from the settings' own types, bounds and docstrings.

Run it again after every change to a setting: `.venv/bin/python tools/make_settings_page.py`. A test compares the page
with what this script would write.
"""

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fiberpo_megatron.config import Config  # noqa: E402
from fiberpo_megatron.fibration import OBJECTIVES, objective_class  # noqa: E402
from fiberpo_megatron.fibration.options import options_of  # noqa: E402
from fiberpo_megatron.plugins import BUILT_IN, find, parameters  # noqa: E402
from fiberpo_megatron.settings import PluginConfig  # noqa: E402

PAGE = ROOT / "docs/settings.md"
COMMAND = ".venv/bin/python tools/make_settings_page.py"

KINDS = {
    "environments": ("[[environments]]", "use"),
    "objectives": ("[algorithm]", "objective"),
    "advantages": ("[algorithm]", "advantage"),
    "optimizers": ("[optimizer]", "kind"),
    "publishers": ("[weight_sync]", "method"),
    "sinks": ("[telemetry]", "sinks"),
}
"""The section and the key that name a plug-in of each kind."""

PASSED = {"publishers": ("context",), "sinks": ("context",)}
"""Arguments, by kind, that the program passes to the built-in classes; they are not options."""

INTRODUCTION = f"""\
# Settings

This page is generated from the source (`{COMMAND}`); edit the docstrings there, not this page.

A config is a TOML file with the sections below. Any setting can be overridden on the command line:
`fiberpo train CONFIG.toml --parallel.tensor 2`. Unknown keys, and numbers that are not finite, are refused. A setting
without a default that is marked "required" must be given; "unset" means that the program chooses, as described.

A *plug-in* is a short name, the import path of a class of your own (`package.module:Class`), or a table with its
options: `{{use = "package.module:Class", options = {{name = value}}}}` ([extending.md](extending.md)). The options of
the built-in plug-ins are listed at the end.
"""


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION, *_sections(Config, ""), "## Options of the built-in plug-ins\n", *_plugins()]
    return "\n".join(parts)


def _sections(section: type[BaseModel], name: str, *, is_list: bool = False) -> Iterator[str]:
    """Yield a section and the sections inside it, each with a heading and a table."""
    inner: list[tuple[str, type[BaseModel], bool]] = []
    rows = []
    for key, field in section.model_fields.items():
        below = _section_of(field.annotation)
        if below is not None:
            inner.append((f"{name}.{key}" if name else key, *below))
        else:
            rows.append((f"`{key}`", _type(field), _default(field), field.description or ""))
    if rows:
        yield f"## `{'[[' if is_list else '['}{name}{']]' if is_list else ']'}`\n"
        if documented := _own_docstring(section):
            yield documented + "\n"
        yield _table(("key", "type", "default", "meaning"), rows)
    for below_name, below_section, below_is_list in inner:
        yield from _sections(below_section, below_name, is_list=below_is_list)


def _section_of(annotation: Any) -> tuple[type[BaseModel], bool] | None:
    """Return the section behind a type, and whether it stands for a list of tables; None for a plain setting."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not PluginConfig:
            return kind, typing.get_origin(annotation) is list
    return None


def _own_docstring(section: type) -> str:
    return _escaped(inspect.cleandoc(section.__dict__.get("__doc__") or ""))


def _type(field: FieldInfo) -> str:
    bounds = []
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            bounds.append(f"at least {_number(bound.ge)}")
        elif isinstance(bound, annotated_types.Gt):
            bounds.append(f"above {_number(bound.gt)}")
        elif isinstance(bound, annotated_types.Le):
            bounds.append(f"at most {_number(bound.le)}")
        elif isinstance(bound, annotated_types.Lt):
            bounds.append(f"below {_number(bound.lt)}")
        elif isinstance(bound, annotated_types.MinLen):
            bounds.append("not empty" if bound.min_length == 1 else f"at least {bound.min_length} long")
        elif pattern := getattr(bound, "pattern", None):
            bounds.append(f"matches `{pattern}`")
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return "any value"
    if isinstance(kind, type) and issubclass(kind, PluginConfig):
        return "plug-in"
    if origin is Literal:
        return "one of " + ", ".join(f'`"{choice}"`' for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is list:
        return f"list of {_plural(_type_name(arguments[0]))}"
    if origin in (Sequence, Mapping):
        return _type_name((list if origin is Sequence else dict)[arguments])
    if origin is tuple:
        same = len(set(arguments) - {Ellipsis}) == 1
        if same and Ellipsis in arguments:
            return f"list of {_plural(_type_name(arguments[0]))}"
        return f"list of {len(arguments)} {_plural(_type_name(arguments[0]))}" if same else "list"
    if origin is dict:
        return f"table of {_plural(_type_name(arguments[1]))}"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(kind) or getattr(kind, "__name__", str(kind))


def _plural(name: str) -> str:
    if name.startswith("list of "):
        return f"lists of {name.removeprefix('list of ')}"
    return name if name.endswith(("s", "`", "value")) or " or " in name else name + "s"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "unset" if default is None or default is PydanticUndefined else f"`{_toml(default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, PluginConfig):
        return _toml(value.use)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value))


def _number(value: Any) -> str:
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", repr(value)).replace("e+", "e")


def _plugins() -> Iterator[str]:
    """Yield the options of the built-in plug-ins, kind by kind."""
    for kind, (section, key) in KINDS.items():
        yield f"### `{key}` of `{section}`\n"
        shown: dict[str, str] = {}
        for name in OBJECTIVES if kind == "objectives" else tuple(BUILT_IN[kind]):
            target = objective_class(name) if kind == "objectives" else find(kind, name, key).target
            yield f"**`{name}`**: {_summary(target)}\n"
            table = _options_table(target, PASSED.get(kind, ()))
            yield f"Its options are those of `{shown[table]}`.\n" if table in shown else table
            shown.setdefault(table, name)


def _options_table(target: Any, passed: Sequence[str]) -> str:
    if is_dataclass(target):
        options = [(option.name, option.default, option.doc) for option in options_of(target)]
        hints = typing.get_type_hints(target)
    else:
        documented = _documented_arguments(target)
        options = [
            (name, parameter.default, documented.get(name, ""))
            for name, parameter in parameters(target)[0].items()
            if name not in passed
        ]
        constructors = [c.__init__ for c in reversed(target.__mro__) if "__init__" in vars(c) and c is not object]
        hints = {
            name: hint for constructor in constructors for name, hint in typing.get_type_hints(constructor).items()
        }
    rows = [
        (f"`{name}`", _type_name(hints[name]), _option_default(default), _as_sentence(doc))
        for name, default, doc in options
    ]
    return _table(("option", "type", "default", "meaning"), rows) if rows else "It has no options.\n"


def _summary(target: Any) -> str:
    """Return the docstring of a class as one paragraph, without what is shown as the meaning of an option."""
    sentences = _sentences(target.__dict__.get("__doc__"))
    return _escaped(" ".join(sentence for sentence in sentences if not sentence.startswith(("`", "Raises "))))


def _documented_arguments(target: Any) -> dict[str, str]:
    """Return the meaning of each argument of a class by its name.

    The docstring of the class or of its constructor, or of a class that it derives from, gives it in a line
    "name: meaning", or in a sentence with the name in backticks.
    """
    own = [one for one in target.__mro__ if one is not object] if inspect.isclass(target) else [target]
    documented = [item for one in own for item in (one, vars(one).get("__init__"))]
    texts = [inspect.cleandoc(item.__doc__) for item in documented if item is not None and item.__doc__]
    found: dict[str, str] = {}
    for text in texts:
        for match in _ARGUMENT.finditer(text or ""):
            found.setdefault(match.group(2), " ".join(match.group(3).split()))
    for sentence in (sentence for text in texts for sentence in _sentences(text)):
        for name in re.findall(r"`(\w+)`", sentence):
            found.setdefault(name, sentence)
    return found


_ARGUMENT = re.compile(r"^([ \t]*)([a-z_]\w*): (.*(?:\n\1[ \t]+\S.*)*)", re.MULTILINE)


def _sentences(text: str | None) -> list[str]:
    prose = _ARGUMENT.sub("", inspect.cleandoc(text or ""))
    return [sentence for sentence in re.split(r"(?<=\.)\s+", " ".join(prose.split())) if sentence]


def _as_sentence(text: str) -> str:
    """Return text with a capital letter, unless a value of the option begins it, and a full stop."""
    first = text[:1] if re.match(r"\w+: ", text) else text[:1].upper()
    return f"{first}{text[1:].removesuffix('.')}." if text else ""


def _option_default(default: Any) -> str:
    if default in (inspect.Parameter.empty, MISSING):
        return "required"
    return "unset" if default is None else f"`{_toml(default)}`"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is: on one line, with bars and angle brackets escaped outside of code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([|<>*_])", r"\\\1", part) for part in parts
    )


def main() -> int:
    """Write the page and return the exit code."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
