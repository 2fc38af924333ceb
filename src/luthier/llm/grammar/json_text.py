"""JSON as rules: strings, numbers, arrays, objects and the white space between them (RFC 8259).

White space is bounded, because a small model otherwise indents until its limit: nothing, one space, or a new line with
its indentation. So compact, ordinary and indented JSON can all be written. Numbers are bounded to what every reader
takes: integers of 18 digits, 16 digits before and behind a point, exponents of two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from luthier.llm.grammar.expressions import (
    Characters,
    Expression,
    Grammar,
    Range,
    Reference,
    Terminal,
    characters,
    concat,
    either,
    optional,
    repeat,
)

MAX_INDENTATION = 32
INTEGER_DIGITS = 18
DIGITS = 16
DIGIT = Characters(((0x30, 0x39),))
NONZERO = Characters(((0x31, 0x39),))
SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
FIRST_PRINTABLE = 0x20


class JsonRules:
    """The rules of JSON in a grammar; each is written when it is first used."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._value: Reference | None = None

    @property
    def space(self) -> Expression:
        """What may stand between two parts."""
        indentation = repeat(Characters(((0x09, 0x09), (0x20, 0x20))), 0, MAX_INDENTATION)
        return self._grammar.rule("space", either(optional(" "), concat("\n", indentation)))

    @property
    def character(self) -> Expression:
        """One character of a string, as itself or escaped; half a surrogate pair is none."""
        hex_digit = _one_of("0-9", "a-f", "A-F")
        inside = concat(_one_of("0-9", "a-c", "A-C", "e-f", "E-F"), repeat(hex_digit, 3, 3))
        low = concat(_one_of("d-d", "D-D"), _one_of("0-7"), repeat(hex_digit, 2, 2))
        pair = concat(
            *(_one_of("d-d", "D-D"), _one_of("8-9", "a-b", "A-B"), repeat(hex_digit, 2, 2), "\\u"),
            *(_one_of("d-d", "D-D"), _one_of("c-f", "C-F"), repeat(hex_digit, 2, 2)),
        )
        short = _one_of('"-"', "\\-\\", "/-/", "b-b", "f-f", "n-n", "r-r", "t-t")
        escaped = either(short, concat("u", either(inside, low, pair)))
        return self._grammar.rule("character", either(plain((FIRST_PRINTABLE, 0x10FFFF)), concat("\\", escaped)))

    @property
    def string(self) -> Expression:
        """Any string."""
        return self._grammar.rule("string", self.string_of(0, None))

    def string_of(self, least: int, most: int | None) -> Expression:
        """Return a string of so many characters."""
        return concat('"', repeat(self.character, least, most), '"')

    @property
    def integer(self) -> Expression:
        """Any number without a fraction."""
        return self._grammar.rule("integer", concat(optional("-"), _whole(INTEGER_DIGITS)))

    @property
    def number(self) -> Expression:
        """Any number."""
        exponent = concat(_one_of("e-e", "E-E"), optional(_one_of("+-+", "---")), repeat(DIGIT, 1, 2))
        fraction = concat(".", repeat(DIGIT, 1, DIGITS))
        return self._grammar.rule(
            "number", concat(optional("-"), _whole(DIGITS), repeat(fraction, 0, 1), repeat(exponent, 0, 1))
        )

    @property
    def value(self) -> Expression:
        """Any JSON."""
        if self._value is None:
            self._value = Reference(self._grammar.name("value"))
            self._grammar.rules[self._value.rule] = either(
                self.object, self.array_of(self._value, 0, None), self.string, self.number, "true", "false", "null"
            )
        return self._value

    @property
    def object(self) -> Expression:
        """Any object."""
        return self._grammar.rule("object", self.map_of(self.value))

    def map_of(self, value: Expression) -> Expression:
        """Return an object of any keys whose values all match ``value``."""
        return self.listed("{", self.pair(self.string, value), "}", 0, None)

    def array_of(self, item: Expression, least: int, most: int | None) -> Expression:
        """Return an array of so many items."""
        return self.listed("[", item, "]", least, most)

    def pair(self, key: Expression, value: Expression) -> Expression:
        """Return a key and its value."""
        return concat(key, ":", self.space, value)

    def listed(self, opening: str, item: Expression, closing: str, least: int, most: int | None) -> Expression:
        """Return so many items between brackets."""
        more = None if most is None else most - 1
        items = concat(item, repeat(concat(",", self.space, item), max(least - 1, 0), more), self.space)
        content = repeat(items, 0, 1) if least == 0 else items
        return concat(opening, self.space, content if most != 0 else repeat(items, 0, 0), closing)


def json_literal(value: object) -> Expression:
    """Return exactly this value.

    Raises:
        ValueError: it is no JSON (NaN, say).
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Terminal(text if text.isprintable() else json.dumps(value, allow_nan=False))


def plain(*ranges: Range) -> Expression:
    """Return one character of some ranges that stands for itself in a JSON string."""
    special = (ord('"'), ord("\\"))
    kept: list[Range] = []
    for low, high in ranges:
        start = max(low, FIRST_PRINTABLE)
        for code in special:
            if start <= code <= high:
                kept.append((start, code - 1))
                start = code + 1
        kept.append((start, high))
    return characters(*(part for part in kept if part[0] <= part[1]))


def in_string(ranges: Sequence[Range]) -> Expression:
    """Return one character of some ranges as a JSON string writes it."""
    codes = [*range(FIRST_PRINTABLE), ord('"'), ord("\\")]
    escaped = [chr(code) for code in codes if any(low <= code <= high for low, high in ranges)]
    return either(plain(*ranges), *(SHORT_ESCAPES.get(one, f"\\u{ord(one):04x}") for one in escaped))


def _whole(digits: int) -> Expression:
    return either("0", concat(NONZERO, repeat(DIGIT, 0, digits - 1)))


def _one_of(*ranges: str) -> Characters:
    return Characters(tuple((ord(part[0]), ord(part[2])) for part in ranges))
