"""Handlebars texts: compile once, know which fields they use, render to plain text (no HTML escaping).

The language is handlebars.js 4.7 through the ``dotpromptz-handlebars`` package; ``tests/templates`` holds it against
the cases that people type. Two helpers are added: ``{{json value}}`` and ``{{#if (eq a "b")}}`` or ``{{#eq a "b"}}``.
What the package would pass over in silence (a helper that does not exist, ``{{else each}}``, ``{{items.length}}``) is
refused when the text is compiled. Loops within loops can make any amount of text from a short example: what one
rendering goes through and makes is counted, and has bounds (:data:`MAX_PIECES`, :data:`MAX_LETTERS`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from dotpromptz_handlebars import Block, ElseNode, HelperFn, HelperOptions, Mustache, Node, Partial, PartialBlock, Text
from dotpromptz_handlebars._render import _js_text, compile_template, render_program

from luthier.errors import InputError, did_you_mean

MAX_PIECES = 2**18  # texts, tags, turns of loops, and elements of values that one rendering goes through
MAX_LETTERS = 2**24  # that it makes: more than the longest line that is read
LETTERS_OF_A_PIECE = 1024  # a longer value counts as several
FIELDS_OF_A_PIECE = 64
FEW_TAGS = 16  # without a loop
VALUES_OF_HELPER = {"if": 1, "unless": 1, "each": 1, "with": 1, "eq": 2, "json": 1, "lookup": 2}
BLOCK_HELPERS = ("if", "unless", "each", "with", "eq")
INLINE_HELPERS = ("eq", "json", "lookup")
SAME_CONTEXT_BLOCKS = ("if", "unless", "eq")
COUNT_TURNS, SHOW = "count turns", "show a value"
WORDS_OF_THE_LANGUAGE = {"this", ".", "true", "false", "null", "undefined", "else"}
NUMBER = re.compile(r"-?\d+(\.\d+)?$")
TAG = re.compile(r"(?<!\\)(?:\{\{~?!--(?:.*?--~?\}\}|.*)|\{\{[^{}]*\}\})", re.DOTALL)
STANDALONE_TAG = re.compile(r"\{\{~?\s*(?:[#/^!]|else\b)")
ELSE_TAG = re.compile(r"(\{\{~?\s*else)\s+([^\s~}(]+)\s*(.*)", re.DOTALL)
SPACES_TO_NEXT_TAG = re.compile(r"[ \t]+\{\{")


class _Meter:
    """What one rendering has gone through and made."""

    def __init__(self) -> None:
        self._pieces = 0
        self._letters = 0

    def count(self, pieces: int = 0, letters: int = 0) -> None:
        """Count what comes next.

        Raises:
            ValueError: it is more than a rendering may have.
        """
        self._pieces += pieces
        self._letters += letters
        if self._pieces > MAX_PIECES:
            raise ValueError(f"it goes through more than {MAX_PIECES:,} pieces (texts, tags, elements, turns of loops)")
        if self._letters > MAX_LETTERS:
            raise ValueError(f"it makes more than {MAX_LETTERS:,} letters")


_METER: ContextVar[_Meter] = ContextVar("meter")


class _Body(list[Node]):
    """What stands in a block or around all: to go through it counts its pieces and its texts' letters."""

    def __init__(self, nodes: Iterable[Node], pieces: int, letters: int) -> None:
        super().__init__(nodes)
        self._pieces = pieces
        self._letters = letters

    def __iter__(self) -> Iterator[Node]:
        _METER.get().count(self._pieces, self._letters)
        return super().__iter__()


def _meter(options: HelperOptions) -> _Meter:
    """Return the meter for a helper, whose call has copied the fields around it: that counts too."""
    meter = _METER.get()
    if isinstance(options.context, Mapping):
        meter.count(len(options.context) // FIELDS_OF_A_PIECE)
    return meter


def _pieces_of(value: Any) -> int:
    if isinstance(value, str):
        return len(value) // LETTERS_OF_A_PIECE
    if isinstance(value, Mapping):
        return len(value) + sum(map(_pieces_of, value.values()))
    return len(value) + sum(map(_pieces_of, value)) if isinstance(value, Sequence) else 0


def _count_turns(arguments: list[Any], options: HelperOptions) -> str:
    """Count the turns of a loop before the package makes a list of them."""
    if isinstance(arguments[0], Mapping | Sequence) and not isinstance(arguments[0], str):
        _meter(options).count(len(arguments[0]))
    return ""


def _show(arguments: list[Any], options: HelperOptions) -> Any:
    """Return a value that stands alone in a tag; functions stay what they are, as the package refuses them."""
    value, meter = arguments[0], _meter(options)
    meter.count(_pieces_of(value))
    if not callable(value):
        meter.count(letters=len(_js_text(value)))
    return value


def _lookup(arguments: list[Any], options: HelperOptions) -> Any:
    _meter(options)
    values, key = arguments
    if isinstance(values, dict):
        return values.get(key)
    try:
        index = int(key)
    except (TypeError, ValueError):
        return None
    return values[index] if isinstance(values, list) and 0 <= index < len(values) else None


def _json(arguments: list[Any], options: HelperOptions) -> str:
    meter = _meter(options)
    meter.count(_pieces_of(arguments[0]))
    text = json.dumps(arguments[0], ensure_ascii=False)
    meter.count(letters=len(text))
    return text


def _eq(arguments: list[Any], options: HelperOptions) -> Any:
    _meter(options).count(sum(map(_pieces_of, arguments)))
    equal = bool(arguments[0] == arguments[1])
    if not options.is_block:
        return equal
    return options.fn() if equal else options.inverse()


HELPERS: dict[str, HelperFn] = {
    **{"json": _json, "eq": _eq, "lookup": _lookup},
    **{COUNT_TURNS: _count_turns, SHOW: _show},
}


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
        try:
            program = compile_template(TAG.sub(_prepare_tag, source))
            self.fields = frozenset(_fields(program, depth=0))
            self._program = _counted(program) if _may_grow(program) else program
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
            InputError: the text fails on these fields, such as a value that JSON cannot write; or its loops go through
                more than ``MAX_PIECES``, or make more than ``MAX_LETTERS``.
        """
        metering = _METER.set(_Meter())
        try:
            return render_program(
                self._program,
                dict(fields),
                data=None,
                helpers=HELPERS,
                partials={},
                escape_html=False,
                strict=False,
            )
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise InputError(f"The {self.place} fails on this example: {error}") from error
        finally:
            _METER.reset(metering)


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


def _may_grow(nodes: Sequence[Node]) -> bool:
    """Return whether a text can be many times as long as the fields that it shows; counting takes twice the time."""
    return _tags(nodes) > FEW_TAGS


def _tags(nodes: Sequence[Node]) -> float:
    """Return how many tags one rendering goes through; without a bound where it may loop."""
    found = 0.0
    for node in nodes:
        if isinstance(node, Block):
            found += math.inf if _loops(node) else 1 + _tags(node.body) + _tags(node.inverse)
        else:
            found += not isinstance(node, Text)
    return found


def _counted(nodes: Sequence[Node]) -> _Body:
    """Return nodes that count what they go through and make, in part by calls of helpers that no tag can name."""
    letters = sum(len(node.value) for node in nodes if isinstance(node, Text))
    tags = sum(_letters_of_tag(node.call) for node in nodes if isinstance(node, Mustache | Block))
    counted: list[Node] = []
    for node in nodes:
        if isinstance(node, Block):
            counted += [_call_of(COUNT_TURNS, loop) for loop in _loops(node)]
            counted.append(Block(node.call, _counted(node.body), _counted(node.inverse)))
        elif isinstance(node, Mustache) and (value := _value_shown(node.call)):
            counted.append(_call_of(SHOW, value))
        else:
            counted.append(node)
    return _Body(counted, 1 + len(nodes) + tags // LETTERS_OF_A_PIECE, letters)


def _value_shown(call: dict[str, Any]) -> str:
    """Return what stands for the value that a tag shows, or nothing where its helper counts it."""
    name: str = call["name"]
    if name == "lookup":
        return f"({' '.join([name, *call['args']])})"
    return "" if name in HELPERS else name


def _call_of(helper: str, *values: str) -> Mustache:
    return Mustache({"name": helper, "args": list(values), "hash": {}, "params": [], "literal": False})


def _loops(block: Block) -> list[str]:
    """Return what a block may go through element by element, where it may."""
    name = block.call["name"]
    if name == "each":
        return [block.call["args"][0]]
    return [] if name in BLOCK_HELPERS else [name]


def _letters_of_tag(call: dict[str, Any]) -> int:
    return sum(map(len, (call["name"], *call["args"], *call["hash"].values())))


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
