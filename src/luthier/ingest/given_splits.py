"""Sides that a dataset brings along in a column, as published ones do; validation comes out of train if it lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from luthier.errors import InputError, did_you_mean
from luthier.ingest.splitting import assign_splits
from luthier.records.dataset import SplitConfig, SplitReport
from luthier.records.example import Example, SplitName

NAMES: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing", "held_out", "held-out"), "test"),
}


def given_splits(examples: Sequence[Example], config: SplitConfig) -> tuple[list[SplitName], SplitReport]:
    """Return the side that ``config.column`` says for each example, and a report.

    Where no example is for validation, the share ``config.validation`` of the training ones is, chosen as
    :func:`~luthier.ingest.splitting.assign_splits` does.

    Raises:
        InputError: the column is unknown, a value is not a side (all at once), or nothing is left to train on.
    """
    column = config.column or ""
    known = sorted({name for example in examples for name in example.fields})
    if column not in known:
        raise InputError(f"The split column {column!r} is unknown.{did_you_mean(column, known)}")
    values = [str(example.fields.get(column, "")).strip().lower() for example in examples]
    wrong = sorted({value for value in values if value not in NAMES})
    if wrong:
        raise InputError(
            f"The split column {column!r} has values that are no side.",
            problems=[f"{value!r} is not one of {', '.join(NAMES)}" for value in wrong[:20]],
        )
    sides = [NAMES[value] for value in values]
    training = [index for index, side in enumerate(sides) if side == "train"]
    if not training:
        raise InputError(f"The split column {column!r} has no training examples.")
    if "validation" not in sides and config.validation:
        inner = config.model_copy(update={"test": 0.0, "column": None})
        chosen, _ = assign_splits([examples[index] for index in training], inner)
        for index, side in zip(training, chosen, strict=True):
            sides[index] = side
    return sides, _report(examples, sides, config)


def _report(examples: Sequence[Example], sides: Sequence[SplitName], config: SplitConfig) -> SplitReport:
    counts: Counter[SplitName] = Counter(sides)
    labels: dict[SplitName, Counter[str]] = {side: Counter() for side in counts}
    for example, side in zip(examples, sides, strict=True):
        if config.label:
            labels[side][str(example.fields.get(config.label, ""))] += 1
    found = {side: dict(values) for side, values in labels.items()} if config.label else {}
    return SplitReport(config=config, counts=dict(counts), label_counts=found)
