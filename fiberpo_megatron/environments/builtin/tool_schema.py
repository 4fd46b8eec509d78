"""This module describes tools by JSON schemas, and says what is wrong with arguments that a model wrote.

    tool = tool_of(search)          # def search(query: str, count: int = 5) -> str: with a docstring
    tool.schema                     # what chat templates and OpenAI's API call a tool
    problem_with({"count": 3}, tool.schema["function"]["parameters"])   # "the argument 'query' is missing"

It imports the standard library alone and runs on Python 3.10.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from fiberpo_megatron.environments import Task

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_INSTANCES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Tool:
    """Holds a tool that the policy may call."""

    name: str
    schema: Mapping[str, Any]
    """{"type": "function", "function": {"name", "description", "parameters"}}, as chat templates take it."""
    call: Callable[..., Any]
    """What is called with the arguments by name; it may be an `async def`."""
    task_argument: str | None = None
    """The argument that gets the task, which the policy does not see."""
    bounds_itself: bool = False
    """Whether it raises TimeoutError itself when its time is over."""


def tool_of(target: Any) -> Tool:
    """Return the tool that a function is, or the instance of a class that has a `schema` and can be called.

    The schema of a function is made of its type hints and its docstring: the first paragraph describes the tool, and
    a line `name: text` describes an argument. An argument with the hint `Task` gets the task.

    Raises ValueError for a function whose arguments cannot be described.
    """
    if inspect.isclass(target):
        target = target()
    own = getattr(target, "schema", None)
    if own is not None:
        function = own.get("function", own)
        if not isinstance(function, Mapping) or not {"name", "description", "parameters"} <= set(function):
            raise ValueError(f"its schema is {own!r:.200}; it needs `name`, `description` and `parameters`")
        return Tool(str(function["name"]), {"type": "function", "function": dict(function)}, target)
    if not callable(target):
        raise ValueError(f"it is {target!r:.100}, neither a function nor a class with a `schema`")
    described = target if inspect.isfunction(target) else type(target).__call__
    name = getattr(target, "__name__", type(target).__name__)
    text = inspect.getdoc(target) or ""
    if not text:
        raise ValueError(f"{name} has no docstring; say in one what the tool does, and each argument as `name: text`")
    hints = typing.get_type_hints(described)
    properties: dict[str, Any] = {}
    required: list[str] = []
    task_argument = None
    for parameter in inspect.signature(target).parameters.values():
        hint = hints.get(parameter.name)
        if hint is Task:
            task_argument = parameter.name
            continue
        if hint is None or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"the argument {parameter.name!r} of {name} has no type hint, or no name to pass it by")
        properties[parameter.name] = _schema_of(hint, f"{name}({parameter.name})") | _description(text, parameter.name)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    about = " ".join(text.split("\n\n")[0].split())
    schema = {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}
    return Tool(name, schema, target, task_argument)


def _description(docstring: str, argument: str) -> dict[str, str]:
    """Return what a docstring says about an argument: its line, and those that are indented further."""
    found = re.search(rf"^( *){argument}(?: *\([^)]*\))?: *(.*(?:\n\1 +\S.*)*)", docstring, re.MULTILINE)
    return {} if found is None else {"description": " ".join(found[2].split())}


def _schema_of(hint: Any, where: str) -> dict[str, Any]:
    """Return the JSON schema of a type hint. Raises ValueError for one that JSON has no type for."""
    if hint is Any:
        return {}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [_schema_of(one, where) for one in inner if one is not type(None)]
        nullable = [{"type": "null"}] if type(None) in inner else []
        return kinds[0] if len(kinds) == 1 and not nullable else {"anyOf": [*kinds, *nullable]}
    if origin is Literal:
        return {"enum": list(inner)}
    kind = _TYPES.get(origin or hint)
    if kind is None:
        raise ValueError(
            f"{where}: the type {hint!r} has no counterpart in JSON; use str, int, float, bool, list or dict"
        )
    if kind == "array" and inner:
        return {"type": kind, "items": _schema_of(inner[0], where)}
    return {"type": kind}


def problem_with(value: Any, schema: Mapping[str, Any], where: str = "the arguments") -> str | None:
    """Return what is wrong with a value, in one sentence; None if nothing is.

    It knows `type`, `enum`, `const`, `anyOf`, `properties`, `required`, `additionalProperties` and `items`.
    """
    if "anyOf" in schema:
        problems = [problem_with(value, one, where) for one in schema["anyOf"]]
        return None if None in problems else problems[0]
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_of(value, kind) for kind in kinds):
        return f"{where} must be of the type {' or '.join(kinds)}, not {_short(value)}"
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed is not None and value not in allowed:
        return f"{where} must be one of {_short(allowed)}, not {_short(value)}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"the argument {name!r} is missing"
        for name, inner in value.items():
            if name not in properties and schema.get("additionalProperties", True) is False:
                return f"there is no argument {name!r}; the arguments are {', '.join(properties) or 'none'}"
            problem = problem_with(inner, properties.get(name, {}), f"the argument {name!r}")
            if problem is not None:
                return problem
    if isinstance(value, list):
        for number, inner in enumerate(value):
            problem = problem_with(inner, schema.get("items", {}), f"{where}[{number}]")
            if problem is not None:
                return problem
    return None


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _INSTANCES.get(kind, (object,)))


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 100 else f"{text[:100]}..."
