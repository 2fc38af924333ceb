"""What an answer must be, ready for an engine: any JSON object, or JSON of a schema."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from luthier.llm.grammar.expressions import IMPOSSIBLE, Expression, Grammar, ebnf, size
from luthier.llm.grammar.schema import SchemaError, schema_rules
from luthier.records.completion import Constraint

MAX_RULE_PARTS = 50_000
MAX_CHARACTERS = 500_000  # of a grammar
REMEMBERED = 64  # grammars
REMEMBERED_CHARACTERS = 50_000  # of a schema; larger ones are read anew each time
ANY_OBJECT = {"type": "object"}


def json_constraint(schema: Any) -> Constraint:
    """Return the constraint to JSON that a schema accepts.

    Raises:
        SchemaError: saying where the schema is wrong, or has what cannot be decoded by.
    """
    text = schema_text(schema)
    return _json_constraint(text) if len(text) <= REMEMBERED_CHARACTERS else _json_constraint.__wrapped__(text)


def schema_text(schema: Any) -> str:
    """Return a schema's text with its properties in their order, which is that of the answer.

    Raises:
        SchemaError: it is no JSON (NaN, say), or nested too deep.
    """
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"The schema is no JSON: {error}") from error


@lru_cache(maxsize=REMEMBERED)
def _json_constraint(text: str) -> Constraint:
    schema = json.loads(text)
    grammar = Grammar()
    return Constraint(grammar=grammar_text(grammar, schema_rules(grammar, schema)), json_schema=schema)


def grammar_text(grammar: Grammar, root: Expression) -> str:
    """Return the text of a grammar that is complete.

    Raises:
        SchemaError: nothing of finite length matches, or there is too much to decode by.
    """
    found, rules = grammar.pruned(root)
    if found == IMPOSSIBLE:
        raise SchemaError("No value satisfies the schema.")
    if size(found, rules) > MAX_RULE_PARTS:
        raise SchemaError(f"The schema makes more than {MAX_RULE_PARTS:,} parts of rules.")
    text = ebnf(found, rules)
    if len(text) > MAX_CHARACTERS:
        raise SchemaError(f"The schema makes rules of more than {MAX_CHARACTERS:,} letters.")
    return text
