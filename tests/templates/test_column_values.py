"""Columns give weights, margins and thumbs; all values that break a rule are reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from luthier.errors import InputError, NothingToLearnError
from luthier.records.example import Example
from luthier.templates import column_values
from luthier.templates.column_values import in_parts, read_margins, read_thumbs, read_weights, with_weight
from luthier.templates.labelled import LabelledText


def rows(*values: Any) -> list[Example]:
    return [Example(id=f"e{number}", fields={"v": value}) for number, value in enumerate(values, 1)]


def test_no_column_means_the_same_for_all() -> None:
    examples = rows("a", "b")
    assert read_weights(examples, None) == [1.0, 1.0]
    assert read_margins(examples, None) == [0.0, 0.0]
    assert read_thumbs(examples, None) == [None, None]


def test_weights_are_numbers_of_json_or_text_of_csv() -> None:
    assert read_weights(rows(2, 0.5, " 1.5 ", "0", "1e2"), "v") == [2.0, 0.5, 1.5, 0.0, 100.0]


WRONG = [-1, "-0.1", "nan", "inf", "heavy", "", None, True, [1], 10**400]


def test_wrong_weights_are_all_named_with_their_examples() -> None:
    with pytest.raises(InputError, match="10 of 11 values in the column 'v'") as caught:
        read_weights(rows(1, *WRONG), "v")
    assert "finite number, 0 or more" in caught.value.message
    assert caught.value.problems[:2] == ("example e2: weight -1", "example e3: weight '-0.1'")
    assert len(caught.value.problems) == len(WRONG)


def weighing(*weights: float) -> list[LabelledText]:
    return [LabelledText("e", "text", "label", weight) for weight in weights]


def test_weights_that_are_all_0_leave_nothing_to_learn() -> None:
    assert read_weights(rows(0, "0.0"), "v") == [0.0, 0.0]
    with pytest.raises(NothingToLearnError, match="All 2 weights in the column 'v' are 0"):
        list(with_weight(weighing(0, 0.0), "v"))
    assert len(list(with_weight(weighing(0, 0.5, 0), "v"))) == 3
    assert list(with_weight(weighing(), "v")) == []


# Any number of examples


@pytest.fixture
def three_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_values, "EXAMPLES_AT_ONCE", 3)


@pytest.mark.usefixtures("three_at_once")
def test_examples_are_read_as_they_are_needed() -> None:
    read = 0

    def endless() -> Iterator[Example]:
        nonlocal read
        while True:
            read += 1
            yield Example(id=str(read), fields={"v": read})

    weights = in_parts(endless(), lambda some: read_weights(some, "v"))
    assert [next(weights) for _ in range(4)] == [1, 2, 3, 4]
    assert read == 6


@pytest.mark.usefixtures("three_at_once")
def test_wrong_values_of_all_parts_are_raised_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*values: Any) -> list[float]:
        return list(in_parts(rows(*values), lambda some: read_weights(some, "v")))

    with pytest.raises(InputError, match=r"^1 of 3 values in the column 'v' are not valid"):
        read(1, 2, 3, 4, "x", 6, 7)  # in one part alone: as that part says it
    with pytest.raises(InputError, match=r"^3 values are not valid\. In the first part: 2 of 3 values") as caught:
        read(1, -1, "x", 4, 5, 6, None)
    assert caught.value.problems == ("example e2: weight -1", "example e3: weight 'x'", "example e7: weight None")
    monkeypatch.setattr(column_values, "PROBLEMS_KEPT", 2)
    with pytest.raises(InputError, match="3 values are not valid") as caught:
        read(1, -1, "x", 4, 5, 6, None)
    assert len(caught.value.problems) == 2


def test_margins_may_be_negative_but_must_be_finite() -> None:
    assert read_margins(rows(-1, "0.25"), "v") == [-1.0, 0.25]
    with pytest.raises(InputError, match="1 of 2 values"):
        read_margins(rows(1, "inf"), "v")


def test_thumbs_are_read_from_all_usual_words() -> None:
    up = [True, 1, 1.0, "true", "1", "YES", " up ", "Good"]
    down = [False, 0, 0.0, "False", "0", "no", "DOWN", "bad"]
    assert read_thumbs(rows(*up, *down), "v") == [True] * len(up) + [False] * len(down)


def test_values_that_are_no_thumbs_are_listed_with_the_words_that_are() -> None:
    with pytest.raises(InputError, match=r"true/false, 1/0, yes/no, up/down, good/bad") as caught:
        read_thumbs(rows(True, "maybe", 2, None, 0.5), "v")
    assert caught.value.problems == (
        "example e2: thumb 'maybe'",
        "example e3: thumb 2",
        "example e4: thumb None",
        "example e5: thumb 0.5",
    )
