"""This module evaluates arithmetic that a model wrote, by its own small interpreter and within fixed bounds."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

LONGEST = 1000
"""Characters of an expression."""
BITS = 8192
"""Size of the largest whole number, about 2,400 digits."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "gcd": math.gcd,
    "lcm": math.lcm,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculator(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    expression: for example 12 * (3 + 4.5) or sqrt(2) ** 3; it may use + - * / // % ** and the functions abs, ceil, cos,
        exp, floor, gcd, lcm, log, log10, log2, max, min, round, sin, sqrt, tan.
    """
    text = (
        expression.strip().replace("^", "**").replace("\N{MULTIPLICATION SIGN}", "*").replace("\N{DIVISION SIGN}", "/")
    )
    if len(text) > LONGEST:
        raise ValueError(f"the expression has {len(text)} characters, more than {LONGEST}")
    try:
        tree = ast.parse(text.replace("\N{MINUS SIGN}", "-"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text[:100]!r} is not an arithmetic expression") from None
    value = _value(tree.body)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    return str(value)


def _value(node: ast.expr) -> int | float:
    """Return the value of a part. Raises ValueError, OverflowError or ZeroDivisionError with what is wrong."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        whole = isinstance(left, int) and isinstance(right, int) and abs(left) > 1
        if isinstance(node.op, ast.Pow) and whole and int(left).bit_length() * abs(right) > BITS:
            raise ValueError(f"a power is larger than 2 ** {BITS}")
        return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id in _FUNCTIONS:
            try:
                return _bounded(_FUNCTIONS[node.func.id](*map(_value, node.args)))
            except TypeError as error:
                raise ValueError(f"{node.func.id}: {error}") from None
        raise ValueError(f"there is no function {node.func.id!r}; use one of {', '.join(_FUNCTIONS)}")
    raise ValueError(f"{ast.unparse(node)[:100]!r} is not arithmetic")


def _bounded(value: Any) -> int | float:
    if isinstance(value, int) and value.bit_length() > BITS:
        raise ValueError(f"a number is larger than 2 ** {BITS}")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("the value is not a finite real number")
    return value
