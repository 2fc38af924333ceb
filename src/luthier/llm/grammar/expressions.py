"""Context-free grammars as values, and their text in the EBNF that xgrammar reads.

Expressions are made with :func:`concat`, :func:`either` and :func:`repeat`, which leave out what can never match. So a
grammar is right by its making: an engine that fails on one fails all its requests with it.
The text keeps to what llama.cpp's GBNF has too (https://github.com/ggml-org/llama.cpp/tree/master/grammars).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

HIGHEST = 0x10FFFF
ONE_BYTE = 0x7F
BLOCK = 100  # in repetitions of some more, xgrammar (2026) takes half a second of a core for every token
SURROGATES = (0xD800, 0xDFFF)
CONTROL = re.compile(r"([\x00-\x1f\x7f-\x9f])([0-9a-fA-F]?)")
Range = tuple[int, int]


@dataclass(frozen=True)
class Terminal:
    """Exactly this text."""

    text: str


@dataclass(frozen=True)
class Characters:
    """One character of these ranges of code points, both ends included."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Concatenation:
    """All parts, one behind the other."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Alternatives:
    """One of the options; without any, nothing matches."""

    options: tuple[Expression, ...]


@dataclass(frozen=True)
class Repetition:
    """A part, ``least`` to ``most`` times; None has no bound."""

    part: Expression
    least: int
    most: int | None


@dataclass(frozen=True)
class Reference:
    """What the rule of this name matches."""

    rule: str


Expression = Terminal | Characters | Concatenation | Alternatives | Repetition | Reference
EMPTY = Concatenation(())
IMPOSSIBLE = Alternatives(())


def characters(*ranges: Range) -> Expression:
    """Return one character of some ranges; half a surrogate pair is no character."""
    first, last = SURROGATES
    kept = [part for low, high in ranges for part in ((low, min(high, first - 1)), (max(low, last + 1), high))]
    whole = merged(part for part in kept if part[0] <= part[1])
    return Characters(whole) if whole else IMPOSSIBLE


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return ranges in order, with those joined that touch."""
    result: list[Range] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return tuple(result)


def complement(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return all code points that are in none of the ranges."""
    rest: list[Range] = []
    start = 0
    for low, high in merged(ranges):
        if start < low:
            rest.append((start, low - 1))
        start = high + 1
    return (*rest, (start, HIGHEST)) if start <= HIGHEST else tuple(rest)


def concat(*parts: Expression | str) -> Expression:
    """Return parts one behind the other; texts stand for themselves."""
    whole: list[Expression] = []
    for part in (Terminal(part) if isinstance(part, str) else part for part in parts):
        if part == IMPOSSIBLE:
            return IMPOSSIBLE
        for piece in part.parts if isinstance(part, Concatenation) else (part,):
            if isinstance(piece, Terminal) and whole and isinstance(whole[-1], Terminal):
                whole[-1] = Terminal(whole[-1].text + piece.text)
            elif piece != Terminal(""):
                whole.append(piece)
    return whole[0] if len(whole) == 1 else Concatenation(tuple(whole))


def either(*options: Expression | str) -> Expression:
    """Return a choice of the options that can match."""
    found: dict[Expression, None] = {}
    for option in (Terminal(option) if isinstance(option, str) else option for option in options):
        found |= dict.fromkeys(option.options if isinstance(option, Alternatives) else (option,))
    possible = tuple(found)
    return possible[0] if len(possible) == 1 else Alternatives(possible)


def repeat(part: Expression, least: int = 0, most: int | None = None) -> Expression:
    """Return a part, ``least`` to ``most`` times; None has no bound."""
    if most is not None and most < least:
        return IMPOSSIBLE
    if part == IMPOSSIBLE:
        return EMPTY if least == 0 else IMPOSSIBLE
    if part == EMPTY or most == 0:
        return EMPTY
    return part if (least, most) == (1, 1) else Repetition(part, least, most)


def optional(*parts: Expression | str) -> Expression:
    """Return parts that may be left out together."""
    return repeat(concat(*parts), 0, 1)


class Grammar:
    """Rules by name, as far as they have been written."""

    def __init__(self) -> None:
        self.rules: dict[str, Expression] = {}
        self._names: dict[Expression, str] = {}

    def name(self, hint: str) -> str:
        """Take a name for a rule that is written later."""
        stem = re.sub(r"[^a-z0-9]+", "-", hint.lower()).strip("-")
        name = f"{stem}-{len(self.rules)}" if stem and stem[0].isalpha() else f"r-{len(self.rules)}"
        self.rules[name] = IMPOSSIBLE
        return name

    def rule(self, hint: str, expression: Expression) -> Expression:
        """Write a rule and return a reference to it; the same expression makes one rule."""
        if isinstance(expression, Reference | Terminal) or expression in (EMPTY, IMPOSSIBLE):
            return expression
        if expression not in self._names:
            self._names[expression] = self.name(hint)
            self.rules[self._names[expression]] = expression
        return Reference(self._names[expression])

    def pruned(self, root: Expression) -> tuple[Expression, dict[str, Expression]]:
        """Return a root and the rules that it needs, without what could never come to an end."""
        root = self._in_blocks(root)
        for name in list(self.rules):
            self.rules[name] = self._in_blocks(self.rules[name])
        ending = _ending(self.rules)
        needed: dict[str, Expression] = {}
        first = _without(root, ending)
        waiting = [first]
        while waiting:
            for name in _references(waiting.pop()):
                if name not in needed:
                    needed[name] = _without(self.rules[name], ending)
                    waiting.append(needed[name])
        return first, needed

    def _in_blocks(self, expression: Expression) -> Expression:
        """Return an expression whose long repetitions are made of shorter ones."""
        if isinstance(expression, Concatenation):
            return concat(*map(self._in_blocks, expression.parts))
        if isinstance(expression, Alternatives):
            return either(*map(self._in_blocks, expression.options))
        if not isinstance(expression, Repetition):
            return expression
        part, least, most = self._in_blocks(expression.part), expression.least, expression.most
        if max(least, most or 0) <= BLOCK:
            return repeat(part, least, most)
        rest = repeat(part, 0, None) if most is None else self._up_to(part, most - least)
        return concat(self._exactly(part, least), rest)

    def _exactly(self, part: Expression, times: int) -> Expression:
        if times <= BLOCK:
            return repeat(part, times, times)
        block = self.rule("block", repeat(part, BLOCK, BLOCK))
        return concat(self._exactly(block, times // BLOCK), repeat(part, times % BLOCK, times % BLOCK))

    def _up_to(self, part: Expression, times: int) -> Expression:
        if times <= BLOCK:
            return repeat(part, 0, times)
        block = self.rule("block", repeat(part, BLOCK, BLOCK))
        blocks, rest = divmod(times, BLOCK)
        fewer = concat(self._up_to(block, blocks - 1), repeat(part, 0, BLOCK - 1))
        return either(fewer, concat(self._exactly(block, blocks), repeat(part, 0, rest)))


def ebnf(root: Expression, rules: Mapping[str, Expression]) -> str:
    """Return a grammar's text."""
    lines = [("root", root), *rules.items()]
    return "".join(f"{name} ::= {_text(expression)}\n" for name, expression in lines)


def size(root: Expression, rules: Mapping[str, Expression]) -> int:
    """Return how many parts a grammar has."""
    return sum(_size(expression) for expression in (root, *rules.values()))


# Analysis


def _parts(expression: Expression) -> tuple[Expression, ...]:
    if isinstance(expression, Concatenation):
        return expression.parts
    if isinstance(expression, Alternatives):
        return expression.options
    return (expression.part,) if isinstance(expression, Repetition) else ()


def _size(expression: Expression) -> int:
    return 1 + sum(_size(part) for part in _parts(expression))


def _references(expression: Expression) -> list[str]:
    if isinstance(expression, Reference):
        return [expression.rule]
    return [name for part in _parts(expression) for name in _references(part)]


def _ending(rules: dict[str, Expression]) -> set[str]:
    """Return the rules that match at least one text of finite length."""
    ending: set[str] = set()
    grown = True
    while grown:
        grown = False
        for name, expression in (*rules.items(), *reversed(rules.items())):  # what a rule needs is on either side
            if name not in ending and _ends(expression, ending):
                ending.add(name)
                grown = True
    return ending


def _ends(expression: Expression, ending: set[str]) -> bool:
    if isinstance(expression, Reference):
        return expression.rule in ending
    if isinstance(expression, Alternatives):
        return any(_ends(option, ending) for option in expression.options)
    if isinstance(expression, Repetition) and expression.least == 0:
        return True
    return all(_ends(part, ending) for part in _parts(expression))


def _without(expression: Expression, ending: set[str]) -> Expression:
    """Return an expression without what never ends."""
    if isinstance(expression, Reference):
        return expression if expression.rule in ending else IMPOSSIBLE
    if isinstance(expression, Concatenation):
        return concat(*(_without(part, ending) for part in expression.parts))
    if isinstance(expression, Alternatives):
        return either(*(_without(option, ending) for option in expression.options))
    if isinstance(expression, Repetition):
        return repeat(_without(expression.part, ending), expression.least, expression.most)
    return expression


# Text


def _text(expression: Expression) -> str:
    if isinstance(expression, Terminal):
        return _quoted(expression.text)
    if isinstance(expression, Characters):
        parts = [part for low, high in expression.ranges for part in _by_bytes(low, high)]
        if all(chr(end).isalnum() and end <= ONE_BYTE for part in parts for end in part):
            return "[" + "".join(chr(low) if low == high else f"{chr(low)}-{chr(high)}" for low, high in parts) + "]"
        return "[" + "".join(_range_text(low, high) for low, high in parts) + "]"
    if isinstance(expression, Concatenation):
        return " ".join(map(_text, expression.parts)) or '""'
    if isinstance(expression, Alternatives):
        return f"({' | '.join(map(_text, expression.options))})"
    if isinstance(expression, Repetition):
        return f"({_text(expression.part)}){_times(expression.least, expression.most)}"
    return expression.rule


def _times(least: int, most: int | None) -> str:
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    if (least, most) in short:
        return short[least, most]
    return f"{{{least}}}" if least == most else f"{{{least},{'' if most is None else most}}}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + CONTROL.sub(_escaped_control, escaped) + '"'


def _escaped_control(found: re.Match[str]) -> str:
    # A hexadecimal digit behind an escape stands in a string of its own: xgrammar reads escapes on into it.
    return f'{_point(ord(found[1]))}" "{found[2]}' if found[2] else _point(ord(found[1]))


def _by_bytes(low: int, high: int) -> list[Range]:
    """Return a range in parts of which each is, in UTF-8, a product of ranges of bytes.

    In others, xgrammar (2026) lets bytes through that are no characters, or that it cannot go on from. The parts are
    those of https://github.com/BurntSushi/utf8-ranges.
    """
    for last in (0x7F, 0x7FF, 0xFFFF):  # of one, two, three bytes
        if low <= last < high:
            return _by_bytes(low, last) + _by_bytes(last + 1, high)
    if high <= ONE_BYTE:
        return [(low, high)]
    for bits in (6, 12, 18):
        rest = (1 << bits) - 1
        if low & ~rest != high & ~rest:
            if low & rest:
                return _by_bytes(low, low | rest) + _by_bytes((low | rest) + 1, high)
            if high & rest != rest:
                return _by_bytes(low, (high & ~rest) - 1) + _by_bytes(high & ~rest, high)
    return [(low, high)]


def _range_text(low: int, high: int) -> str:
    return _point(low) if low == high else f"{_point(low)}-{_point(high)}"


def _point(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
