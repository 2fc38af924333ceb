"""Handlebars texts: compile once, know which fields they use, render to plain text (no HTML escaping).

The language is handlebars.js 4.7 through the ``dotpromptz-handlebars`` package; ``tests/templates`` holds it against
the cases that people type. Two helpers are added: ``{{json value}}`` and ``{{#if (eq a "b")}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dotpromptz_handlebars import Block, EscapeFunction, Handlebars, Mustache, Node, Partial, PartialBlock
from dotpromptz_handlebars._render import compile_template

from luthier.errors import InputError, did_you_mean

SAME_CONTEXT_BLOCKS = {"if", "unless"}
WORDS_OF_THE_LANGUAGE = {"this", ".", "true", "false", "null", "undefined", "else"}
# a quoted string | a [bracketed segment] path | any other word
WORD = re.compile(r"""("[^"]*"|'[^']*')|((?:[^\s()\[\]'"=|]|\[[^\]]*\])+)""")
NUMBER = re.compile(r"-?\d+(\.\d+)?$")


def _json(arguments: list[Any], _options: Any) -> str:
    return json.dumps(arguments[0], ensure_ascii=False)


def _eq(arguments: list[Any], _options: Any) -> bool:
    return bool(arguments[0] == arguments[1])


HELPERS = {"json": _json, "eq": _eq}
BUILT_IN_HELPERS = {"if", "unless", "each", "with", "lookup", "log"}


class HandlebarsText:
    """A compiled handlebars text.

    Args:
        source: The text.
        place: What a message calls it ("user template", say).

    Raises:
        InputError: the text does not parse, or uses partials (there is nothing to include).
    """

    def __init__(self, source: str, place: str = "template") -> None:
        self.source = source
        self.place = place
        engine = Handlebars(escape_fn=EscapeFunction.NO_ESCAPE)
        for name, helper in HELPERS.items():
            engine.register_helper(name, helper)
        try:
            nodes = compile_template(source)
            self._render = engine.compile(source)
        except (ValueError, RecursionError) as error:
            raise InputError(f"The {place} is not valid handlebars: {error}", hint=f"it reads: {source!r}") from error
        self.fields = frozenset(_fields(nodes, depth=0, place=place))

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
            InputError: the text fails on these fields, such as a helper that gets too few values.
        """
        try:
            return str(self._render(dict(fields)))
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise InputError(f"The {self.place} fails on this example: {error}") from error


def _fields(nodes: Iterable[Node], depth: int, place: str) -> Iterator[str]:
    """Yield the root fields that nodes use; ``depth`` counts the enclosing blocks that change the context."""
    for node in nodes:
        if isinstance(node, Partial | PartialBlock):
            raise InputError(f"The {place} includes the partial {node.name!r}; partials are not supported.")
        if isinstance(node, Mustache):
            yield from _call_fields(node.call, depth)
        elif isinstance(node, Block):
            yield from _call_fields(node.call, depth)
            inner = depth if node.call["name"] in SAME_CONTEXT_BLOCKS else depth + 1
            yield from _fields(node.body, inner, place)
            yield from _fields(node.inverse, depth, place)


def _call_fields(call: dict[str, Any], depth: int) -> Iterator[str]:
    is_helper = call["name"] in BUILT_IN_HELPERS or call["name"] in HELPERS
    words = [] if is_helper or call["literal"] else [call["name"]]
    for argument in [*call["args"], *call["hash"].values()]:
        words += _words(str(argument))
    for word in words:
        field = _root_field(word, depth)
        if field is not None:
            yield field


def _words(argument: str) -> list[str]:
    """Return the paths in an argument; in a (sub expression) the first word is a helper's name."""
    words = [match.group(2) for match in WORD.finditer(argument) if match.group(2)]
    if argument.startswith("("):
        words = [word for word in words if word not in HELPERS and word not in BUILT_IN_HELPERS]
    return words


def _root_field(path: str, depth: int) -> str | None:
    """Return the root field that a path starts from, or None where it means something else."""
    if path.startswith("@root."):
        path, depth = path.removeprefix("@root."), 0
    while path.startswith(("../", "./", "this.", "this/")):
        depth -= path.startswith("../")
        path = path.split("/" if path.startswith((".", "this/")) else ".", 1)[1]
    if depth > 0 or path in WORDS_OF_THE_LANGUAGE or path.startswith("@") or NUMBER.match(path):
        return None
    return path[1 : path.index("]")] if path.startswith("[") else re.split(r"[./]", path, maxsplit=1)[0]
