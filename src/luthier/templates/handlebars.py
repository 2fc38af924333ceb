"""Handlebars texts: compile once, know which fields they use, render to plain text (no HTML escaping).

The language is handlebars.js 4.7 through the ``dotpromptz-handlebars`` package; ``tests/templates`` holds it against
the cases that people type. Two helpers are added: ``{{json value}}`` and ``{{#if (eq a "b")}}`` or ``{{#eq a "b"}}``.
What the package would pass over in silence (a helper that does not exist, ``{{else each}}``, ``{{items.length}}``) is
refused when the text is compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dotpromptz_handlebars import (
    Block,
    ElseNode,
    EscapeFunction,
    Handlebars,
    HelperOptions,
    Mustache,
    Node,
    Partial,
    PartialBlock,
)
from dotpromptz_handlebars._render import compile_template

from luthier.errors import InputError, did_you_mean

VALUES_OF_HELPER = {"if": 1, "unless": 1, "each": 1, "with": 1, "eq": 2, "json": 1, "lookup": 2}
BLOCK_HELPERS = ("if", "unless", "each", "with", "eq")
INLINE_HELPERS = ("eq", "json", "lookup")
SAME_CONTEXT_BLOCKS = ("if", "unless", "eq")
WORDS_OF_THE_LANGUAGE = {"this", ".", "true", "false", "null", "undefined", "else"}
NUMBER = re.compile(r"-?\d+(\.\d+)?$")
TAG = re.compile(r"(?<!\\)(?:\{\{~?!--.*?--~?\}\}|\{\{[^{}]*\}\})", re.DOTALL)
STANDALONE_TAG = re.compile(r"\{\{~?\s*(?:[#/^!]|else\b)")
ELSE_TAG = re.compile(r"(\{\{~?\s*else)\s+([^\s~}(]+)\s*(.*)", re.DOTALL)
SPACES_TO_NEXT_TAG = re.compile(r"[ \t]+\{\{")


def _json(arguments: list[Any], _options: HelperOptions) -> str:
    return json.dumps(arguments[0], ensure_ascii=False)


def _eq(arguments: list[Any], options: HelperOptions) -> Any:
    equal = bool(arguments[0] == arguments[1])
    if not options.is_block:
        return equal
    return options.fn() if equal else options.inverse()


class HandlebarsText:
    """A compiled handlebars text.

    Args:
        source: The text.
        place: What a message calls it ("user template", say).

    Raises:
        InputError: the text does not parse, calls a helper that does not exist or with another number of values, or
            uses partials (there is nothing to include).
    """

    def __init__(self, source: str, place: str = "template") -> None:
        self.source = source
        self.place = place
        engine = Handlebars(escape_fn=EscapeFunction.NO_ESCAPE)
        engine.unregister_helper("log")  # it would print
        engine.register_helper("json", _json)
        engine.register_helper("eq", _eq)
        try:
            prepared = TAG.sub(_prepare_tag, source)
            self._render = engine.compile(prepared)
            self.fields = frozenset(_fields(compile_template(prepared), depth=0))
        except (ValueError, RecursionError, IndexError) as error:
            reason = "a tag has no name" if isinstance(error, IndexError) else error
            raise InputError(f"The {place} is not valid handlebars: {reason}", hint=f"it reads: {source!r}") from error

    def check_fields(self, known: Iterable[str]) -> None:
        """Refuse a text that uses a field which the examples do not have.

        Raises:
            InputError: naming every unknown field, each with the closest known one.
        """
        names = set(known)
        unknown = sorted(self.fields - names)
        if unknown:
            raise InputError(
                f"The {self.place} uses fields that the dataset does not have.",
                problems=[f"{{{{{name}}}}} is unknown.{did_you_mean(name, names)}" for name in unknown],
            )

    def render(self, fields: Mapping[str, Any]) -> str:
        """Return the text for one example.

        Raises:
            InputError: the text fails on these fields, such as a value that JSON cannot write.
        """
        try:
            return str(self._render(dict(fields)))
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise InputError(f"The {self.place} fails on this example: {error}") from error


def _prepare_tag(match: re.Match[str]) -> str:
    """Return a tag so that the package reads it as handlebars.js does."""
    tag = match[0]
    if chained := ELSE_TAG.match(tag):
        opening, word, rest = chained.groups()
        if word not in ("if", "unless"):
            raise ValueError(f"{tag} is not one of {{{{else}}}}, {{{{else if …}}}} and {{{{else unless …}}}}")
        tag = f"{opening} {word} {rest}"
    # The package takes a tag for alone on its line where only spaces stand before the next tag, and drops them.
    if STANDALONE_TAG.match(tag) and not tag.endswith("~}}") and SPACES_TO_NEXT_TAG.match(match.string, match.end()):
        tag += "{{!}}"
    return tag


def _fields(nodes: Iterable[Node], depth: int) -> Iterator[str]:
    """Yield the root fields that nodes use; ``depth`` counts the enclosing blocks that change the context."""
    for node in nodes:
        if isinstance(node, Partial | PartialBlock):
            raise ValueError(f"it includes the partial {node.name!r}; partials are not supported")
        if isinstance(node, ElseNode):
            raise ValueError("a block has two {{else}}")
        if isinstance(node, Mustache):
            yield from _call_fields(node.call, depth, INLINE_HELPERS)
        elif isinstance(node, Block):
            yield from _call_fields(node.call, depth, BLOCK_HELPERS)
            inner = depth if node.call["name"] in SAME_CONTEXT_BLOCKS else depth + 1
            yield from _fields(node.body, inner)
            yield from _fields(node.inverse, depth)


def _call_fields(
    call: dict[str, Any], depth: int, helpers: tuple[str, ...], *, is_expression: bool = False
) -> Iterator[str]:
    name, values = call["name"], [*call["args"], *call["hash"].values()]
    if call["literal"] or NUMBER.match(name):
        raise ValueError(f"{name!r} is a value; a field of that name is written {{{{[{name}]}}}}")
    if name in VALUES_OF_HELPER:
        _check_helper(name, len(call["args"]), helpers)
    elif values or is_expression:
        spaced = " ".join([name, *values])
        raise ValueError(
            f"there is no helper {name!r}.{did_you_mean(name, helpers)} "
            f"A field whose name has spaces is written {{{{[{spaced}]}}}}"
        )
    else:
        values = [name]
    for value in map(str, values):
        if value.startswith("("):
            inner = compile_template(f"{{{{{value[1:-1].strip()}}}}}")[0]
            if not isinstance(inner, Mustache):
                raise ValueError(f"{value} is not valid")
            yield from _call_fields(inner.call, depth, INLINE_HELPERS, is_expression=True)
        elif value[0] not in "\"'" and (field := _root_field(value, depth)) is not None:
            yield field


def _check_helper(name: str, values: int, helpers: tuple[str, ...]) -> None:
    if name not in helpers:
        form = f"{{{{#{name} …}}}}" if name in BLOCK_HELPERS else f"{{{{{name} …}}}} or ({name} …)"
        raise ValueError(f"{name!r} is written {form}")
    if values != VALUES_OF_HELPER[name]:
        raise ValueError(f"{name!r} takes {VALUES_OF_HELPER[name]} value(s), here it gets {values}")


def _root_field(path: str, depth: int) -> str | None:
    """Return the root field that a path starts from, or None where it means something else."""
    if path.endswith(".length"):
        raise ValueError(f"{path} is not known here; {{{{#if {path.removesuffix('.length')}}}}} is false for no items")
    full = path
    if path.startswith(("@root.", "@root/")):
        path, depth = path[len("@root.") :], 0
    while path.startswith(("../", "./", "this.", "this/")):
        depth -= path.startswith("../")
        path = path.split("/" if path.startswith((".", "this/")) else ".", 1)[1]
    if depth > 0 or path in WORDS_OF_THE_LANGUAGE or path.startswith("@") or NUMBER.match(path):
        return None
    if depth < 0 or path == "..":
        raise ValueError(f"{full} goes above the fields of the example")
    return path[1 : path.index("]")] if path.startswith("[") else re.split(r"[./]", path, maxsplit=1)[0]
