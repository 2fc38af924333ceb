"""Sides that a dataset brings along are followed as they are."""

from __future__ import annotations

import pytest

from luthier.errors import InputError
from luthier.ingest.given_splits import given_splits
from luthier.records.dataset import SplitConfig
from luthier.records.example import Example


def examples(sides: list[str]) -> list[Example]:
    return [Example(id=str(i), fields={"text": f"words number {i} of many", "split": s}) for i, s in enumerate(sides)]


def test_a_column_decides_the_sides() -> None:
    sides, report = given_splits(examples(["train", "Dev", "test", "training"]), SplitConfig(column="split"))
    assert sides == ["train", "validation", "test", "train"]
    assert report.counts == {"train": 2, "validation": 1, "test": 1}


def test_validation_is_taken_from_train_where_there_is_none() -> None:
    sides, report = given_splits(examples(["train"] * 40 + ["test"] * 5), SplitConfig(column="split", validation=0.25))
    assert sides[40:] == ["test"] * 5
    assert report.counts == {"train": 30, "validation": 10, "test": 5}


def test_values_that_are_no_side_are_all_named() -> None:
    with pytest.raises(InputError) as refused:
        given_splits(examples(["train", "holdout", "extra"]), SplitConfig(column="split"))
    assert [problem.split()[0] for problem in refused.value.problems] == ["'extra'", "'holdout'"]


def test_an_unknown_column_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="split"):
        given_splits(examples(["train"]), SplitConfig(column="splits"))
