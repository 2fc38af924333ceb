"""What a classifier says of texts, as answers that evaluations score, and how far numbers are from the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from luthier.errors import InputError
from luthier.records.evaluation import Answer
from luthier.records.record import canonical_json
from luthier.templates.labelled import LabelledText


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one text of ``tokens`` tokens.

    ``score`` is the probability of ``label``, and ``probabilities`` has that of every label. Of a model that predicts a
    number, ``score`` is the number, ``label`` is None, and there are no probabilities.
    """

    label: str | None
    score: float
    probabilities: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0


def as_answers(
    predictions: Sequence[Prediction], texts: Sequence[LabelledText], contestant: str, seconds: float = 0.0
) -> list[Answer]:
    """Return predictions as the answers of a contestant, for :func:`luthier.evaluate.metrics.score`.

    ``seconds`` is the wall time of all of them together.
    """
    return [
        Answer(
            example_id=text.example_id,
            contestant=contestant,
            question=text.text,
            text=f"{prediction.score:g}" if prediction.label is None else prediction.label,
            expected=text.label if isinstance(text.label, str) else canonical_json(text.label),
            label=prediction.label,
            prompt_tokens=prediction.tokens,
            completion_tokens=0,
            seconds=seconds / len(texts),
        )
        for prediction, text in zip(predictions, texts, strict=True)
    ]


def score_numbers(predictions: Sequence[Prediction], expected: Sequence[float]) -> dict[str, float]:
    """Return the mean absolute error, the root of the mean squared error, and R² of predicted numbers.

    R² is 1 minus the squared error over that of always saying the mean; left out where all expected numbers are equal.

    Raises:
        InputError: there are no predictions.
    """
    if not predictions:
        raise InputError("There are no predictions to score.")
    errors = [prediction.score - number for prediction, number in zip(predictions, expected, strict=True)]
    squared = math.fsum(error * error for error in errors)
    mean = math.fsum(expected) / len(expected)
    spread = math.fsum((number - mean) ** 2 for number in expected)
    scores = {
        "mean_absolute_error": math.fsum(map(abs, errors)) / len(errors),
        "root_mean_squared_error": math.sqrt(squared / len(errors)),
    }
    return scores | ({"r_squared": 1 - squared / spread} if spread > 0 else {})
