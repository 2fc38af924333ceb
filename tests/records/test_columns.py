"""Names of columns are checked against the dataset's fields."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from luthier.errors import InputError
from luthier.records.columns import Columns


def test_known_columns_and_none_at_all_are_taken() -> None:
    Columns().check([])
    Columns(label="sentiment", weight="w").check(["text", "sentiment", "w"])


def test_all_unknown_columns_are_named_with_the_closest_field() -> None:
    with pytest.raises(InputError) as caught:
        Columns(label="sentimnet", weight="w", text="text").check(["text", "sentiment"])
    assert caught.value.problems == (
        "the label column 'sentimnet' is unknown. Did you mean 'sentiment'?",
        "the weight column 'w' is unknown. Known: 'sentiment', 'text'.",
    )


def test_unknown_role_of_a_column_is_refused() -> None:
    with pytest.raises(ValidationError):
        Columns.model_validate({"labels": "sentiment"})
