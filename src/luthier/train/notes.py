"""What a run says beside its numbers."""

from __future__ import annotations

from pathlib import Path

from luthier.records.record import Record
from luthier.records.training import StepMetrics
from luthier.train.watch import Warning


class WarningNote(Record):
    """Something seems wrong."""

    warning: Warning


class SampleNote(Record):
    """How the model answers the sample prompts at a step, in tokens, in the order of the prompts."""

    step: int
    answers: list[list[int]]


class PreparationNote(Record):
    """Work before the first step, and which share of it is done."""

    what: str
    share: float


class WeightsNote(Record):
    """The weights after a step were written to a folder, which is overwritten at the next such note."""

    metrics: StepMetrics
    folder: Path


class SavedNote(Record):
    """All that is needed to go on behind a step is on disk."""

    step: int


Note = WarningNote | SampleNote | PreparationNote | WeightsNote | SavedNote
