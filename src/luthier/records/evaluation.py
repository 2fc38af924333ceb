"""Answers of models on held-out examples, their scores, and how far two models are apart."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from luthier.records.example import Message
from luthier.records.record import Record

TaskKind = Literal["label", "text"]


class Answer(Record):
    """One model's answer to one held-out example.

    ``question`` is the last user message. ``label`` is the class read from the text (None where none could be read,
    or for text tasks). ``seconds`` is the batch's wall time divided by its requests. ``expected_logprob`` is the sum
    of the natural log-probabilities of the expected answer's ``expected_tokens`` tokens under the model.
    """

    example_id: str
    contestant: str
    question: str = ""
    text: str
    expected: str
    label: str | None = None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    expected_logprob: float | None = None
    expected_tokens: int | None = None


class Scores(Record):
    """A contestant's scores over the same examples.

    ``metrics`` has for label tasks ``macro_recall``, ``accuracy``, ``macro_f1`` (and ``answered``: the share of
    answers from which a label could be read), for text tasks ``bleu``, ``rouge_l``, ``exact_match``; for both
    ``perplexity`` where it was measured. ``confusion`` is expected label → given label → count.
    """

    contestant: str
    examples: int
    metrics: dict[str, float]
    prompt_tokens_per_request: float
    completion_tokens_per_request: float
    seconds_per_request: float
    confusion: dict[str, dict[str, int]] | None = None


class Difference(Record):
    """``better - worse`` of one metric with a paired bootstrap interval."""

    contestant: str
    baseline: str
    metric: str
    value: float
    low: float
    high: float
    confidence: float = 0.95
    resamples: int


class FewShotChoice(Record):
    """The few-shot prompt that won on validation examples, and what else was tried."""

    shots: tuple[Message, ...]
    validation_score: float
    validation_examples: int
    tried: dict[str, float]


class Evaluation(Record):
    """The result of one evaluation run."""

    id: str
    task: TaskKind
    metric: str
    labels: tuple[str, ...] = ()
    dataset: str
    dataset_hash: str
    template: str | None
    base: str
    model: str | None
    examples: int
    scores: dict[str, Scores]
    differences: dict[str, dict[str, Difference]] = Field(default_factory=dict)
    few_shot: FewShotChoice | None = None
    seconds: float
    created_at: datetime
