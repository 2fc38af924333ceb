"""Regular expressions as rules for the content of a JSON string: ``pattern`` and ``format`` of JSON Schema.

The part of ECMA-262 that is regular is read: characters, classes, groups, alternatives, repetitions, and ``^`` and
``$`` at the ends. What it matches is written as JSON writes it, with quotation marks, backslashes and control
characters escaped. Look-around, references to groups, word boundaries and Unicode properties are refused.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from luthier.llm.grammar.expressions import HIGHEST, Expression, Range, complement, concat, either, repeat
from luthier.llm.grammar.json_text import in_string

MAX_REPEATS = 10_000
MAX_DEPTH = 30
CLASSES: dict[str, tuple[Range, ...]] = {  # what every language takes them for
    "d": ((0x30, 0x39),),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "s": ((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0)),
}
WIDEST: dict[str, tuple[Range, ...]] = {  # what some language may take them for: validators are not all ECMA's
    "d": ((0x30, 0x39), (0x660, HIGHEST)),
    "w": (*CLASSES["w"], (0x80, HIGHEST)),
    "s": (*CLASSES["s"], (0x1C, 0x1F), (0x85, 0x85), (0x1680, 0x1680), (0x2000, 0x3000), (0xFEFF, 0xFEFF)),
}
CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0x00}
LINE_ENDS: tuple[Range, ...] = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
SYNTAX = frozenset("^$\\.*+?()[]{}|/-")
TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?"
DATE = r"[1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
ZONE = r"(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
LABEL = r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
ATOM = r"[A-Za-z0-9_+-]{1,30}"
BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
HEX = r"[0-9a-f]"
FORMATS = {
    "date": DATE,
    "time": TIME + ZONE,
    "date-time": f"{DATE}T{TIME}{ZONE}",
    "duration": r"P(\d{1,4}(D(T\d{1,2}H(\d{1,2}M)?)?|W|Y(\d{1,2}M)?|M)|T\d{1,4}(H(\d{1,2}M)?|M(\d{1,2}S)?|S))",
    "email": rf"{ATOM}(\.{ATOM}){{0,3}}@{LABEL}(\.{LABEL}){{0,3}}\.[a-z]{{2,8}}",
    "hostname": rf"{LABEL}(\.{LABEL}){{0,3}}",
    "ipv4": rf"{BYTE}(\.{BYTE}){{3}}",
    "ipv6": rf"{HEX}{{1,4}}(:{HEX}{{1,4}}){{7}}",
    "uuid": rf"{HEX}{{8}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{12}}",
    "uri": rf"https?://{LABEL}(\.{LABEL}){{0,3}}(/[A-Za-z0-9._~!$&'()*+,;=:@/-]{{0,200}})?",
}


class PatternError(ValueError):
    """A pattern that does not parse, or that is no regular language."""


@dataclass(frozen=True)
class Pattern:
    """What a pattern matches, as the content of a JSON string, and how many characters that has; None: no bound."""

    expression: Expression
    least: int
    most: int | None


def read_pattern(text: str) -> Pattern:
    """Return what a pattern matches; it may match anywhere in the string, as JSON Schema says.

    Raises:
        PatternError: it does not parse, or cannot be a rule.
    """
    return _Reader(text).read()


def read_format(name: str) -> Pattern:
    """Return the strings of a format.

    Raises:
        PatternError: the format is unknown.
    """
    if name not in FORMATS:
        raise PatternError(f"the format {name!r} is not known; known are {', '.join(FORMATS)}")
    return read_pattern(f"^({FORMATS[name]})$")


class _Reader:
    """Reads a pattern from its start to its end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._depth = 0

    def read(self) -> Pattern:
        options = [self._branch()]
        while self._take("|"):
            options.append(self._branch())
        if self._place < len(self._text):
            raise self._error(f"has a {self._text[self._place]!r} that nothing opened")
        return _either(options)

    def _branch(self) -> Pattern:
        """Read an alternative of the whole pattern, which may be anchored at its ends."""
        anything = Pattern(repeat(in_string(((0, HIGHEST),)), 0, None), 0, None)
        before = [] if self._take("^") else [anything]
        inner = self._sequence(until="|)$")
        after = [] if self._take("$") else [anything]
        if self._place < len(self._text) and self._text[self._place] not in "|)":
            raise self._error("has a $ that is not at its end")
        return _row([*before, inner, *after])

    def _alternatives(self) -> Pattern:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"is nested deeper than {MAX_DEPTH} groups")
        options = [self._sequence(until="|)")]
        while self._take("|"):
            options.append(self._sequence(until="|)"))
        self._depth -= 1
        return _either(options)

    def _sequence(self, until: str) -> Pattern:
        parts = []
        while self._place < len(self._text) and self._text[self._place] not in until:
            parts.append(self._repeated(self._atom()))
        return _row(parts)

    def _atom(self) -> Pattern:
        one = self._next()
        if one == "(":
            return self._group()
        if one == "[":
            return _one_of(self._class())
        if one == ".":
            return _one_of(complement(LINE_ENDS))
        if one == "\\":
            return _one_of(self._escape(CLASSES))
        if one in "^$":
            raise self._error(f"has a {one} in its middle")
        if one in "*+?{":
            raise self._error(f"has a {one} with nothing to repeat")
        return _one_of(((ord(one), ord(one)),))

    def _group(self) -> Pattern:
        if self._take("?"):
            if self._take("P<") or (self._text[self._place : self._place + 1] == "<" and not self._ahead("<=", "<!")):
                self._skip_name()
            elif not self._take(":"):
                raise self._error("looks around, which cannot be decoded by")
        inner = self._alternatives()
        if not self._take(")"):
            raise self._error("has a ( that is not closed")
        return inner

    def _skip_name(self) -> None:
        end = self._text.find(">", self._place)
        if end < 0:
            raise self._error("has a group whose name does not end")
        self._place = end + 1

    def _repeated(self, part: Pattern) -> Pattern:
        bounds = self._bounds()
        if bounds is None:
            return part
        self._take("?")  # a lazy repetition matches the same texts
        if self._ahead("+", "*", "?"):
            raise self._error("repeats a repetition")
        least, most = bounds
        if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
            raise self._error(f"repeats {least} to {most} times; {MAX_REPEATS} is the most")
        return Pattern(repeat(part.expression, least, most), part.least * least, _times(part.most, most))

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if not self._take("{"):
            return None
        end = self._text.find("}", self._place)
        low, comma, high = self._text[self._place : end].partition(",")
        if end < 0 or not low.isdecimal() or not (high.isdecimal() or not high):
            raise self._error("has a { that is no number of repetitions")
        self._place = end + 1
        return int(low), (int(high) if high else None) if comma else int(low)

    def _class(self) -> tuple[Range, ...]:
        negated = self._take("^")
        classes = WIDEST if negated else CLASSES
        ranges: list[Range] = []
        while not self._take("]"):
            first = self._member(classes)
            if len(first) == 1 and first[0][0] == first[0][1] and self._ahead("-") and not self._ahead("-]"):
                self._take("-")
                last = self._member(classes)
                if len(last) != 1 or last[0][0] != last[0][1] or last[0][0] < first[0][0]:
                    raise self._error("has a class with a range that is none")
                first = ((first[0][0], last[0][1]),)
            ranges += first
        return complement(ranges) if negated else tuple(ranges)

    def _member(self, classes: dict[str, tuple[Range, ...]]) -> tuple[Range, ...]:
        one = self._next()
        if one != "\\":
            return ((ord(one), ord(one)),)
        if self._take("b"):
            return ((0x08, 0x08),)
        return self._escape(classes)

    def _escape(self, classes: dict[str, tuple[Range, ...]]) -> tuple[Range, ...]:
        one = self._next()
        if one in CONTROLS:
            return ((CONTROLS[one], CONTROLS[one]),)
        if one.lower() in CLASSES:
            other = CLASSES if classes is WIDEST else WIDEST
            return complement(other[one.lower()]) if one.isupper() else classes[one]
        if one in "xu":
            digits = self._text[self._place : self._place + (2 if one == "x" else 4)]
            if len(digits) == (2 if one == "x" else 4) and set(digits) <= set(string.hexdigits):
                self._place += len(digits)
                return ((int(digits, 16), int(digits, 16)),)
            raise self._error(f"has a \\{one} without its digits")
        if one in SYNTAX or not one.isalnum():
            return ((ord(one), ord(one)),)
        raise self._error(f"has \\{one}, which cannot be decoded by")

    def _next(self) -> str:
        if self._place == len(self._text):
            raise self._error("ends in its middle")
        self._place += 1
        return self._text[self._place - 1]

    def _ahead(self, *texts: str) -> bool:
        return self._text.startswith(texts, self._place)

    def _take(self, text: str) -> bool:
        found = self._ahead(text)
        self._place += len(text) if found else 0
        return found

    def _error(self, what: str) -> PatternError:
        return PatternError(f"the pattern {self._text!r} {what}")


def _one_of(ranges: tuple[Range, ...]) -> Pattern:
    return Pattern(in_string(ranges), 1, 1)


def _row(parts: list[Pattern]) -> Pattern:
    lengths = [part.most for part in parts]
    most = None if None in lengths else sum(length or 0 for length in lengths)
    return Pattern(concat(*(part.expression for part in parts)), sum(part.least for part in parts), most)


def _either(options: list[Pattern]) -> Pattern:
    lengths = [option.most for option in options]
    most = None if None in lengths else max(length or 0 for length in lengths)
    expression = either(*(option.expression for option in options)) if len(options) > 1 else options[0].expression
    return Pattern(expression, min(option.least for option in options), most)


def _times(length: int | None, count: int | None) -> int | None:
    if length == 0 or count == 0:
        return 0
    return None if length is None or count is None else length * count
