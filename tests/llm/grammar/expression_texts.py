"""Texts of a grammar: random ones that it matches, and, where it has no recursion, whether it matches a given one."""

from __future__ import annotations

import random
import re

from luthier.llm.grammar.expressions import (
    Alternatives,
    Characters,
    Concatenation,
    Expression,
    Grammar,
    Reference,
    Repetition,
    Terminal,
)


def compiled(root: Expression, grammar: Grammar | None = None) -> re.Pattern[str]:
    """Return a pattern that matches what the expression matches."""
    found, rules = (grammar or Grammar()).pruned(root)
    return re.compile(_text(found, rules), re.DOTALL)


def _text(expression: Expression, rules: dict[str, Expression]) -> str:
    if isinstance(expression, Terminal):
        return re.escape(expression.text)
    if isinstance(expression, Characters):
        ranges = (f"\\U{low:08x}-\\U{high:08x}" for low, high in expression.ranges)
        return "[" + "".join(ranges) + "]"
    if isinstance(expression, Concatenation):
        return "".join(_text(part, rules) for part in expression.parts)
    if isinstance(expression, Alternatives):
        options = "|".join(_text(option, rules) for option in expression.options)
        return f"(?:{options})" if options else "(?!)"
    if isinstance(expression, Repetition):
        most = "" if expression.most is None else expression.most
        return f"(?:{_text(expression.part, rules)}){{{expression.least},{most}}}"
    assert isinstance(expression, Reference)
    return f"(?:{_text(rules[expression.rule], rules)})"


def samples(root: Expression, count: int, grammar: Grammar | None = None) -> list[str]:
    """Return random texts that the expression matches."""
    found, rules = (grammar or Grammar()).pruned(root)
    generator = random.Random(0)
    return [_sample(found, rules, generator, 0) for _ in range(count)]


def _sample(expression: Expression, rules: dict[str, Expression], generator: random.Random, depth: int) -> str:
    if isinstance(expression, Terminal):
        return expression.text
    if isinstance(expression, Characters):
        low, high = generator.choice(expression.ranges)
        return chr(generator.randint(low, min(high, low + 300) if generator.random() < 0.9 else high))
    if isinstance(expression, Concatenation):
        return "".join(_sample(part, rules, generator, depth) for part in expression.parts)
    if isinstance(expression, Alternatives):
        return _sample(generator.choice(expression.options), rules, generator, depth)
    if isinstance(expression, Repetition):
        longest = expression.least + (0 if depth > 30 else 3)
        most = longest if expression.most is None else min(expression.most, longest)
        times = expression.most if generator.random() < 0.1 and (expression.most or 99) < 50 else None
        count = generator.randint(expression.least, most) if times is None else times
        return "".join(_sample(expression.part, rules, generator, depth) for _ in range(count))
    assert isinstance(expression, Reference)
    return _sample(rules[expression.rule], rules, generator, depth + 1)
