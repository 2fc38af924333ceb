"""Numbers between bounds as rules: every text that is matched is a number within them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

from luthier.llm.grammar.expressions import IMPOSSIBLE, Characters, Expression, concat, either, optional, repeat
from luthier.llm.grammar.json_text import DIGIT, DIGITS, INTEGER_DIGITS, NONZERO

ZERO = Characters(((0x30, 0x30),))


@dataclass(frozen=True)
class Bound:
    """An end of a range; ``open`` where it is not part of the range itself."""

    value: Decimal
    open: bool = False


def integer_between(low: int | None, high: int | None) -> Expression:
    """Return the integers of a range; None has no bound."""
    above = natural_between(max(low or 0, 0), high) if high is None or high >= 0 else IMPOSSIBLE
    if low is not None and low >= 0:
        return above
    closest = 1 if high is None or high >= 0 else -high
    return either(above, concat("-", natural_between(closest, None if low is None else -low)))


def natural_between(low: int, high: int | None) -> Expression:
    """Return the integers from ``low`` (0 or more) to ``high``; without one, to as many digits as is sensible."""
    high = max(10**INTEGER_DIGITS, low * 10) - 1 if high is None else high
    if high < low:
        return IMPOSSIBLE
    options = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        least, most = (10 ** (digits - 1) if digits > 1 else 0), 10**digits - 1
        options.append(_fixed(str(max(low, least)), str(min(high, most))))
    return either(*options)


def number_between(low: Bound | None, high: Bound | None, places: int = DIGITS) -> Expression:
    """Return the numbers of a range, with at most so many places behind the point; None has no bound."""
    if low is not None and high is not None and low.value > high.value:
        return IMPOSSIBLE
    zero = Bound(Decimal(0))
    above: Expression = IMPOSSIBLE
    below: Expression = IMPOSSIBLE
    if high is None or high.value >= 0:
        above = _magnitude(low if low is not None and low.value >= 0 else zero, high, places)
    if low is None or low.value < 0:
        closest = Bound(-high.value, high.open) if high is not None and high.value < 0 else Bound(Decimal(0), open=True)
        below = concat("-", _magnitude(closest, None if low is None else Bound(-low.value, low.open), places))
    return either(above, below)


def _magnitude(low: Bound, high: Bound | None, places: int) -> Expression:
    """Return the numbers of a range that begins at 0 or above."""
    first, fraction = _split(low.value)
    anything = _fraction(0, places)
    edge = concat(str(first), _at_least(fraction, places, is_open=low.open))
    if high is None:
        return either(edge, concat(natural_between(first + 1, None), anything))
    last, rest = _split(high.value)
    if first == last:
        return _within(low, high, places)
    return either(
        edge,
        concat(natural_between(first + 1, last - 1), anything),
        concat(str(last), _at_most(rest, places, is_open=high.open)),
    )


def _split(value: Decimal) -> tuple[int, str]:
    """Return a number's whole part and the digits behind its point, without zeros at the end."""
    whole = int(value.to_integral_value(ROUND_FLOOR))
    digits = f"{value - whole:f}".partition(".")[2]
    return whole, digits.rstrip("0")


def _fraction(least: int, most: int) -> Expression:
    return optional(".", repeat(DIGIT, max(least, 1), most))


def _at_least(fraction: str, places: int, *, is_open: bool) -> Expression:
    """Return the fractions that are as large as this one, or larger; none at all is 0."""
    options = [] if fraction or is_open else [_fraction(0, places)]
    options += [_above(fraction, place, places) for place in range(len(fraction))]
    room = places - len(fraction)
    if is_open:
        options += [concat(f".{fraction}", repeat(ZERO, 0, room - 1), NONZERO)] if room > 0 else []
        options += [concat(f".{fraction}", NONZERO, repeat(DIGIT, 0, room - 1))] if room > 0 else []
    elif fraction and room >= 0:
        options.append(concat(f".{fraction}", repeat(DIGIT, 0, room)))
    return either(*options)


def _above(fraction: str, place: int, places: int) -> Expression:
    digit = int(fraction[place])
    if digit == 9 or place >= places:
        return IMPOSSIBLE
    return concat(f".{fraction[:place]}", _digits(digit + 1, 9), repeat(DIGIT, 0, places - place - 1))


def _at_most(fraction: str, places: int, *, is_open: bool) -> Expression:
    """Return the fractions that are as small as this one, or smaller; none at all is 0."""
    options: list[Expression | str] = [] if not fraction and is_open else [""]
    for place, digit in enumerate(fraction[:places]):
        if place:
            options.append(f".{fraction[:place]}")
        if digit != "0":
            smaller = _digits(0, int(digit) - 1)
            options.append(concat(f".{fraction[:place]}", smaller, repeat(DIGIT, 0, places - place - 1)))
    room = places - len(fraction)
    if not is_open and room >= 0:
        zeros = repeat(ZERO, 0 if fraction else 1, room)
        options.append(concat(f".{fraction}", zeros))
    return either(*options)


def _within(low: Bound, high: Bound, places: int) -> Expression:
    """Return the numbers between two that have the same whole part, all with as many digits."""
    if high.value == low.value and (low.open or high.open):
        return IMPOSSIBLE
    whole, first = _split(low.value)
    last = _split(high.value)[1]
    width = min(max(len(first), len(last)) + 1, places)
    least = int((first + "0" * width)[:width] or 0) + (low.open or len(first) > width)
    most = int((last + "0" * width)[:width] or 0) - (high.open and len(last) <= width)
    alone: list[Expression] = [concat(str(whole))] if not first and not low.open else []
    if low.value == high.value and first:
        return concat(f"{whole}.{first}") if len(first) <= places else IMPOSSIBLE
    if most < least or not width:
        return either(*alone)
    return either(*alone, concat(f"{whole}.", _fixed(str(least).zfill(width), str(most).zfill(width))))


def _fixed(low: str, high: str) -> Expression:
    """Return the texts of digits between two of the same length."""
    if low == high:
        return concat(low)
    if not low.strip("0") and not high.strip("9"):
        return repeat(DIGIT, len(low), len(low))
    if low[0] == high[0]:
        return concat(low[0], _fixed(low[1:], high[1:]))
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    options: list[Expression] = []
    if low[1:].strip("0"):
        options.append(concat(low[0], _fixed(low[1:], "9" * rest)))
        first += 1
    if high[1:].strip("9"):
        options.append(concat(high[0], _fixed("0" * rest, high[1:])))
        last -= 1
    if first <= last:
        options.append(concat(_digits(first, last), repeat(DIGIT, rest, rest)))
    return either(*options)


def _digits(first: int, last: int) -> Expression:
    return Characters(((0x30 + first, 0x30 + last),))
