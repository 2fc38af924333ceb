"""Calls of functions as rules: an answer that must call, may call, or either calls or is JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from luthier.llm.grammar.constraints import REMEMBERED, REMEMBERED_CHARACTERS, grammar_text, schema_text
from luthier.llm.grammar.expressions import (
    HIGHEST,
    Expression,
    Grammar,
    Reference,
    characters,
    concat,
    either,
    optional,
    repeat,
)
from luthier.llm.grammar.json_text import json_literal
from luthier.llm.grammar.schema import SchemaError, schema_rules
from luthier.records.completion import Constraint
from luthier.templates.tool_formats import ToolFormat

MAX_CALLS = 32
Kind = Literal["calls", "text", "json"]
Functions = Sequence[tuple[str, Any]]
"""The names of functions with the schemas of their arguments."""


def must_call(tool_format: ToolFormat, functions: Functions, *, several: bool) -> Constraint:
    """Return the constraint to calls of these functions, and nothing else.

    Raises:
        SchemaError: a schema is wrong, or has what cannot be decoded by.
    """
    return _remembered(tool_format, _text(functions), several, "calls", "null")


def may_call(
    tool_format: ToolFormat, functions: Functions, *, several: bool, schema: dict[str, Any] | None = None
) -> Constraint:
    """Return the constraint to an answer that calls these functions, or is JSON of a schema; without one, any text.

    Raises:
        SchemaError: a schema is wrong, or has what cannot be decoded by.
    """
    kind: Kind = "text" if schema is None else "json"
    return _remembered(tool_format, _text(functions), several, kind, schema_text(schema))


def _text(functions: Functions) -> str:
    return schema_text([list(function) for function in functions])


def _remembered(tool_format: ToolFormat, functions: str, several: bool, kind: Kind, schema: str) -> Constraint:
    is_small = len(functions) + len(schema) <= REMEMBERED_CHARACTERS
    make = _constraint if is_small else _constraint.__wrapped__
    return make(tool_format, functions, several, kind, schema)


@lru_cache(maxsize=REMEMBERED)
def _constraint(tool_format: ToolFormat, functions: str, several: bool, kind: Kind, schema: str) -> Constraint:
    grammar = Grammar()
    call = either(*(_call(grammar, tool_format, name, one) for name, one in json.loads(functions)))
    most = MAX_CALLS if several else 1
    if kind == "text" and tool_format.layout != "alone":
        text = _dispatched(grammar, tool_format, grammar.rule("call", call), most)
        return Constraint(grammar=text, is_dispatched=True)
    calls = _calls(tool_format, grammar.rule("call", call), most)
    if kind == "json":
        calls = either(calls, schema_rules(grammar, json.loads(schema)))
    elif kind == "text":
        brace = ord("{")
        anything = characters((0, HIGHEST))
        calls = either(calls, optional(characters((0, brace - 1), (brace + 1, HIGHEST)), repeat(anything)))
    return Constraint(grammar=grammar_text(grammar, calls))


def _call(grammar: Grammar, tool_format: ToolFormat, name: str, schema: Any) -> Expression:
    try:
        arguments = schema_rules(grammar, schema)
    except SchemaError as error:
        raise SchemaError(f"The parameters of {name!r}: {error.message}") from error
    return concat('{"name": ', json_literal(name), f', "{tool_format.arguments_key}": ', arguments, "}")


def _calls(tool_format: ToolFormat, call: Expression, most: int) -> Expression:
    if tool_format.layout == "alone":
        return call
    return concat(tool_format.opening, _behind_opening(tool_format, call, most, again=tool_format.opening))


def _behind_opening(tool_format: ToolFormat, call: Expression, most: int, again: str) -> Expression:
    if tool_format.layout == "array":
        return concat(optional(" "), "[", call, repeat(concat(", ", call), 0, most - 1), "]")
    one = concat("\n", call, f"\n{tool_format.closing}")
    return concat(one, repeat(concat(f"\n{again}", one), 0, most - 1))


def _dispatched(grammar: Grammar, tool_format: ToolFormat, call: Expression, most: int) -> str:
    """Return a grammar of any text in which an opening is followed by calls.

    The rule is xgrammar's own (https://github.com/mlc-ai/xgrammar/blob/main/docs/tutorials/ebnf_guided_generation.md).
    """
    name = grammar.name("calls")
    grammar.rules[name] = _behind_opening(tool_format, call, most if tool_format.layout == "array" else 1, again="")
    _, *rules = grammar_text(grammar, Reference(name)).splitlines(keepends=True)
    again = "true" if most > 1 and tool_format.layout == "tagged" else "false"
    root = f'root ::= TagDispatch(("{tool_format.opening}", {name}), loop_after_dispatch={again})\n'
    return root + "".join(rules)
