"""Columns: which fields of the examples hold the label, the weight and the like."""

from __future__ import annotations

from collections.abc import Iterable

from luthier.errors import InputError, did_you_mean
from luthier.records.record import Record


class Columns(Record):
    """The names of the fields that hold more than text; None: there is no such field.

    ``label``: the class, or the number to predict. ``weight``: what an example's loss is multiplied by, 0 or more.
    ``group``: the group that an example is sampled by. ``margin``: by how much the preferred answer is better.
    ``thumb``: whether an answer was liked. ``text``: the document to continue, or the text to classify.
    """

    label: str | None = None
    weight: str | None = None
    group: str | None = None
    margin: str | None = None
    thumb: str | None = None
    text: str | None = None

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
