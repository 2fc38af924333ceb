"""Formulas over scores: numbers, names, ``+ - * / ^`` and a few functions. Nothing else is evaluated."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping

from luthier.errors import InputError, did_you_mean

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,  # unlike **, it never makes a complex number or a huge integer
}
FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    "min": (min, None),
    "max": (max, None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}


class Formula:
    """A formula that was read and found to be one.

    Args:
        source: Such as ``0.7 * correct + 0.3 * max(short, polite)``.
        names: What it may name.

    Raises:
        InputError: it is something else.
    """

    def __init__(self, source: str, names: Collection[str]) -> None:
        self._names = names
        try:
            self._root = ast.parse(source.strip().replace("^", "**"), mode="eval").body
            self._check(self._root)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise InputError(f"{source!r} is not a formula: {error}") from error

    def value(self, scores: Mapping[str, float]) -> float:
        """Return what the formula gives for some scores.

        Raises:
            InputError: it has no value there, such as a division by zero.
        """
        try:
            value = float(self._evaluate(self._root, scores))
        except (ArithmeticError, ValueError) as error:
            raise InputError(f"The formula has no value here: {error}") from error
        if not math.isfinite(value):
            raise InputError(f"The formula has no finite value here: {value}")
        return value

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=bool()):
                raise ValueError("a number is needed, not True or False")
            case ast.Constant(value=int() | float() as number):
                float(number)
            case ast.Name(id=name):
                if name not in self._names:
                    raise ValueError(f"there is no grader {name!r}.{did_you_mean(name, self._names)}")
            case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
                self._check(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                self._check(left)
                self._check(right)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                self._check_call(name, arguments)
            case _:
                raise ValueError(
                    f"{ast.unparse(node)!r} is none of: numbers, graders, + - * / ^, {', '.join(FUNCTIONS)}"
                )

    def _check_call(self, name: str, arguments: list[ast.expr]) -> None:
        wanted = FUNCTIONS[name][1]
        if not arguments or (wanted is not None and len(arguments) != wanted):
            raise ValueError(f"{name} takes {wanted or 'one or more'} values, not {len(arguments)}")
        for argument in arguments:
            self._check(argument)

    def _evaluate(self, node: ast.expr, scores: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.Name(id=name):
                return scores[name]
            case ast.UnaryOp(op=op, operand=operand):
                value = self._evaluate(operand, scores)
                return -value if isinstance(op, ast.USub) else value
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](self._evaluate(left, scores), self._evaluate(right, scores))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return FUNCTIONS[name][0](*(self._evaluate(argument, scores) for argument in arguments))
        raise ValueError(f"{ast.unparse(node)!r} was not checked")  # pragma: no cover - the check lets nothing else by
