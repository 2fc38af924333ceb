"""Read what columns say of examples (weights, margins, thumbs, numbers); all wrong values are reported at once.

Values may be JSON's own or text, as they come from CSV. :func:`in_parts` reads any number of examples, some at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from luthier.errors import PROBLEMS_KEPT, InputError, NothingToLearnError
from luthier.records.example import Example

T = TypeVar("T")
EXAMPLES_AT_ONCE = 10_000
UP = ("true", "1", "yes", "up", "good")
DOWN = ("false", "0", "no", "down", "bad")


class Weighted(Protocol):
    """What has a weight."""

    @property
    def weight(self) -> float:
        """What its loss is multiplied by."""


W = TypeVar("W", bound=Weighted)


def in_parts(examples: Iterable[Example], read: Callable[[Sequence[Example]], Iterable[T]]) -> Iterator[T]:
    """Yield what ``read`` makes of :data:`EXAMPLES_AT_ONCE` examples at a time; memory does not grow with their number.

    Raises:
        InputError: as ``read``; findings (``problems``) of all parts are raised as one, once all of them were read.
    """
    first: InputError | None = None
    found, rows, problems = 0, iter(examples), list[str]()
    while some := list(islice(rows, EXAMPLES_AT_ONCE)):
        try:
            made = read(some)
        except InputError as error:
            if not error.problems:
                raise
            first = first or error
            found += len(error.problems)
            problems += error.problems[: PROBLEMS_KEPT - len(problems)]
            continue
        yield from made
    if first is None:
        return
    if found > len(first.problems):
        message = f"{found:,} values are not valid. In the first part: {first.message}"
        raise InputError(message, problems=problems, hint=first.hint)
    raise first


def with_weight(units: Iterable[W], column: str | None) -> Iterator[W]:
    """Yield units whose weights come from a column.

    Raises:
        NothingToLearnError: no weight is above 0, once all of them were read.
    """
    count, weighty = 0, False
    for unit in units:
        count += 1
        weighty = weighty or unit.weight > 0
        yield unit
    if count and not weighty:
        raise NothingToLearnError(f"All {count:,} weights in the column {column!r} are 0: nothing is left to learn.")


def read_weights(examples: Sequence[Example], column: str | None) -> list[float]:
    """Return the weight of each example's loss; 1 for all where there is no column.

    Raises:
        InputError: weights that are missing, no finite numbers or negative, all at once.
    """
    return read_values(examples, column, _weight, "weight", "must be a finite number, 0 or more", 1.0)


def read_margins(examples: Sequence[Example], column: str | None) -> list[float]:
    """Return by how much each preferred answer is better; 0 for all where there is no column.

    Raises:
        InputError: margins that are missing or no finite numbers, all at once.
    """
    return read_values(examples, column, finite_number, "margin", "must be a finite number", 0.0)


def read_thumbs(examples: Sequence[Example], column: str | None) -> list[bool | None]:
    """Return whether each answer was liked; None for all where there is no column.

    Raises:
        InputError: values other than true/false, 1/0, yes/no, up/down and good/bad, all at once.
    """
    known = ", ".join(f"{up}/{down}" for up, down in zip(UP, DOWN, strict=True))
    return read_values(examples, column, _thumb, "thumb", f"must be one of {known}", None)


def read_values(
    examples: Sequence[Example], column: str | None, read: Callable[[Any], T], what: str, rule: str, missing: T
) -> list[T]:
    """Return the value of each example in a column; ``missing`` for all where ``column`` is None.

    Args:
        examples: Where the values stand, in their ``fields``.
        column: The field.
        read: Makes a value of what stands there, or raises a ``ValueError``.
        what: What a message calls the value.
        rule: What a value must be.
        missing: The value where there is no column.

    Raises:
        InputError: naming every example whose value breaks the rule.
    """
    if column is None:
        return [missing] * len(examples)
    values: list[T] = []
    problems: list[str] = []
    for example in examples:
        try:
            values.append(read(example.fields.get(column)))
        except ValueError:
            problems.append(f"example {example.id}: {what} {example.fields.get(column)!r}")
    if problems:
        raise InputError(
            f"{len(problems):,} of {len(examples):,} values in the column {column!r} are not valid: a {what} {rule}.",
            problems=problems,
        )
    return values


def finite_number(value: Any) -> float:
    """Return a number, or the number that a text is.

    Raises:
        ValueError: it is neither (true and false are not), or it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _weight(value: Any) -> float:
    number = finite_number(value)
    if number < 0:
        raise ValueError
    return number


def _thumb(value: Any) -> bool | None:
    text = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
    if text not in UP + DOWN:
        raise ValueError
    return text in UP
