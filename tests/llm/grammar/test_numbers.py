"""Rules of numbers match all integers, and only numbers, within their bounds."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from expression_texts import compiled, samples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from luthier.llm.grammar.expressions import IMPOSSIBLE
from luthier.llm.grammar.numbers import Bound, integer_between, number_between

BOUNDS = st.none() | st.integers(-12_000, 12_000)
DECIMALS = st.decimals(-50, 50, places=2)


@settings(deadline=None)
@given(low=BOUNDS, high=BOUNDS, value=st.integers(-13_000, 13_000))
def test_an_integer_is_matched_where_it_is_within_the_bounds(low: int | None, high: int | None, value: int) -> None:
    matches = compiled(integer_between(low, high)).fullmatch(str(value)) is not None
    assert matches == ((low is None or value >= low) and (high is None or value <= high))


@settings(deadline=None)
@given(low=st.none() | DECIMALS, high=st.none() | DECIMALS, opens=st.tuples(st.booleans(), st.booleans()))
def test_every_number_that_is_matched_is_within_the_bounds(
    low: Decimal | None, high: Decimal | None, opens: tuple[bool, bool]
) -> None:
    ends = (None if value is None else Bound(value, is_open) for value, is_open in zip((low, high), opens, strict=True))
    expression = number_between(*ends)
    assume(expression != IMPOSSIBLE)
    for text in samples(expression, 50):
        value = Decimal(text)
        json.loads(text)
        assert low is None or value > low or (value == low and not opens[0]), text
        assert high is None or value < high or (value == high and not opens[1]), text


@pytest.mark.parametrize(
    ("low", "high", "inside", "outside"),
    [
        (Bound(Decimal(0)), Bound(Decimal(1)), ["0", "1", "0.5", "0.05", "1.0"], ["1.1", "2", "-0.5", "00"]),
        (Bound(Decimal(0), open=True), None, ["0.5", "0.001", "17", "3.25"], ["0", "0.0", "-1"]),
        (
            Bound(Decimal("-2.5")),
            Bound(Decimal("3.75")),
            ["-2.5", "-2.49", "-1", "0", "3.7", "3.75"],
            ["-2.51", "3.76"],
        ),
        (Bound(Decimal("0.2")), Bound(Decimal("0.8")), ["0.20", "0.45", "0.80"], ["0.81", "0.19", "0", "1"]),
        (None, Bound(Decimal(0), open=True), ["-0.5", "-3", "-12.25"], ["0", "-0", "-0.0", "1"]),
    ],
)
def test_usual_ranges_have_their_usual_numbers(
    low: Bound | None, high: Bound | None, inside: list[str], outside: list[str]
) -> None:
    pattern = compiled(number_between(low, high))
    assert [text for text in inside if not pattern.fullmatch(text)] == []
    assert [text for text in outside if pattern.fullmatch(text)] == []


def test_places_behind_the_point_can_be_bounded() -> None:
    pattern = compiled(number_between(Bound(Decimal(0)), Bound(Decimal(10)), places=2))
    assert pattern.fullmatch("9.99")
    assert not pattern.fullmatch("9.999")
