"""This module says whether an expression that a model wrote may be evaluated by somebody else's code.

Python's `eval`, and sympy's `parse_expr`, which calls it, run whatever an expression says. What passes here consists of
numbers, names, arithmetic and calls of elementary functions, and cannot grow without bound. This module imports the
standard library alone.
"""

from __future__ import annotations

import ast

LONGEST = 1000
"""Characters of an expression."""
HIGHEST_POWER = 100
POWERS = 8
"""Powers in one expression."""
NESTED_POWERS = 2
_TRIGONOMETRIC = ["sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot"]
_HYPERBOLIC = ["sinh", "cosh", "tanh", "coth", "asinh", "acosh", "atanh"]
FUNCTIONS = frozenset(
    ["sqrt", "cbrt", "exp", "log", "ln", "Abs", "abs", "sign", "Rational", *_TRIGONOMETRIC, *_HYPERBOLIC]
)
"""Functions that may be called."""


def is_harmless_expression(text: str) -> bool:
    """Return whether `text` is an arithmetic expression in Python's notation that is safe and cheap to evaluate."""
    if len(text) > LONGEST:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    powers = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    return len(powers) <= POWERS and _is_harmless(tree.body, NESTED_POWERS)


def _is_harmless(node: ast.expr, powers: int) -> bool:
    """Return whether a part is allowed. `powers`: how many powers may stand inside of each other in it."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, (ast.UAdd, ast.USub)) and _is_harmless(node.operand, powers)
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        return named and not node.keywords and all(_is_harmless(one, powers) for one in node.args)
    if not isinstance(node, ast.BinOp):
        return False
    if isinstance(node.op, (ast.Pow, ast.BitXor)):
        return (
            powers > 0 and _is_small(node.right) and all(_is_harmless(n, powers - 1) for n in (node.left, node.right))
        )
    arithmetic = isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod))
    return arithmetic and _is_harmless(node.left, powers) and _is_harmless(node.right, powers)


def _is_small(exponent: ast.expr) -> bool:
    """Return whether all numbers of an exponent are small, and none of them is raised to a power itself."""
    parts = list(ast.walk(exponent))
    numbers = [part.value for part in parts if isinstance(part, ast.Constant)]
    return not any(isinstance(part, ast.Pow) for part in parts) and all(
        isinstance(number, (int, float)) and abs(number) <= HIGHEST_POWER for number in numbers
    )
