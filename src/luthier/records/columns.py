"""Columns: which fields of the examples hold the label, the weight and the like."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from luthier.errors import InputError, did_you_mean
from luthier.records.record import Record


class Columns(Record):
    """The names of the fields that hold more than text; None: there is no such field."""

    label: str | None = Field(None, description="field with the class, or with the number to predict")
    weight: str | None = Field(None, description="field with what an example's loss is multiplied by, 0 or more")
    group: str | None = Field(None, description="field with the group that resample counts by")
    margin: str | None = Field(None, description="field with how much better the preferred answer is (reward)")
    thumb: str | None = Field(None, description="field that says whether an answer was liked (kto)")
    text: str | None = Field(None, description="field with the document to continue, or the text to classify")

    def check(self, fields: Iterable[str]) -> None:
        """Refuse names that are not among the dataset's fields.

        Raises:
            InputError: naming every unknown one, each with the closest known field.
        """
        known = set(fields)
        problems = [
            f"the {role} column {name!r} is unknown.{did_you_mean(name, known)}"
            for role, name in self.model_dump().items()
            if name is not None and name not in known
        ]
        if problems:
            raise InputError("The dataset does not have these columns.", problems=problems)
