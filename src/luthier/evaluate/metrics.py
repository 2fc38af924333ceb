"""What an evaluation measures: one table of metrics, and the scores of one contestant.

In: the answers of one contestant to held-out examples. Out: :class:`~luthier.records.evaluation.Scores`.

Every metric is a function of sums: each answer gives K numbers (its *statistics*), and the value depends on their
sums alone. That makes the value of any resample of the examples a matter of adding numbers up
(:mod:`luthier.evaluate.bootstrap`). All metrics lie between 0 and 1 and more is better, but for perplexity, which
is 1 or more and less is better.

Dimensions in array names: N answers, R samples of them, K statistics, L labels, O n-gram orders.
"""

# ruff: noqa: N803 (names of arrays end in their dimensions)
from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.errors import InputError, did_you_mean
from luthier.evaluate.labels import label_named
from luthier.records.evaluation import Answer, Scores, TaskKind

# sacrebleu (0.1 to 0.3 s), rouge_score and scikit-learn (1 to 4 s each) are imported where they are used: whoever
# only reads the table of metrics, such as a form or `--help`, must not wait for them.

Floats = npt.NDArray[np.float64]
NO_LABEL = "(no label)"
NGRAM_ORDERS = 4
TEXTS_REMEMBERED = 1 << 14
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Metric:
    """One metric: its name, the task it is for (None: both), and how to compute it on any sample.

    ``statistics(answers, labels)`` gives an N × K array and ``value(sums)`` the R values of R × K sums; a value that
    is not defined, such as the perplexity of no tokens, is NaN.
    """

    name: str
    task: TaskKind | None
    meaning: str
    statistics: Callable[[Sequence[Answer], Sequence[str]], Floats]
    value: Callable[[Floats], Floats]
    higher_is_better: bool = True


def metric_named(name: str, task: TaskKind) -> Metric:
    """Return a metric.

    Raises:
        InputError: there is none of that name for the task.
    """
    known = [metric.name for metric in metrics_of(task)]
    if name not in known:
        raise InputError(f"{name!r} is no metric of {task} tasks.{did_you_mean(name, known)}")
    return METRICS[name]


def metrics_of(task: TaskKind) -> tuple[Metric, ...]:
    """Return the metrics of a task, in the order to show them in."""
    return tuple(metric for metric in METRICS.values() if metric.task in (task, None))


def value_of(metric: Metric, answers: Sequence[Answer], labels: Sequence[str] = ()) -> float:
    """Return a metric's value over the answers; NaN where it is not defined.

    Raises:
        InputError: an expected answer or a given label is not one of ``labels``.
    """
    sums_1K = metric.statistics(answers, labels).sum(axis=0, keepdims=True)
    return float(metric.value(sums_1K)[0])


def score(answers: Sequence[Answer], task: TaskKind, labels: Sequence[str] = ()) -> Scores:
    """Return the scores of one contestant. Perplexity is left out where no answer has log-probabilities.

    Raises:
        InputError: there are no answers, they are of several contestants, or a label is not one of ``labels``.
    """
    contestants = {answer.contestant for answer in answers}
    if len(contestants) != 1:
        raise InputError(f"Scores are of the answers of one contestant, not of {sorted(contestants) or 'none'}.")
    values = {metric.name: value_of(metric, answers, labels) for metric in metrics_of(task)}
    if task == "label":
        values |= _sklearn_scores(answers, labels)
    return Scores(
        contestant=answers[0].contestant,
        examples=len(answers),
        metrics={name: value for name, value in values.items() if not np.isnan(value)},
        prompt_tokens_per_request=_mean(answer.prompt_tokens for answer in answers),
        completion_tokens_per_request=_mean(answer.completion_tokens for answer in answers),
        seconds_per_request=_mean(answer.seconds for answer in answers),
        confusion=confusion(answers, labels) if task == "label" else None,
    )


def confusion(answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return expected label → given label (or ``NO_LABEL``) → count, in the order of ``labels``, without zeros."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for expected, answer in zip(expected_labels(answers, labels), answers, strict=True):
        counts[expected][answer.label or NO_LABEL] += 1
    given = (*labels, NO_LABEL)
    return {row: {name: counts[row][name] for name in given if counts[row][name]} for row in labels if row in counts}


def expected_labels(answers: Sequence[Answer], labels: Sequence[str]) -> list[str]:
    """Return the expected label of each answer, as it is spelled in ``labels``.

    Raises:
        InputError: an expected answer is none of the labels, or an answer's label is not.
    """
    named = {text: label_named(text, labels) for text in {answer.expected for answer in answers}}
    strange = sorted(text for text, label in named.items() if label is None)
    strange += sorted({answer.label for answer in answers if answer.label is not None} - set(labels))
    if strange:
        raise InputError(
            f"{len(strange)} answers are none of the {len(labels)} labels.",
            problems=[repr(text[:80]) for text in strange],
            hint="add them to the labels, or evaluate as a text task",
        )
    return [label for answer in answers if (label := named[answer.expected]) is not None]


def _sklearn_scores(answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, float]:
    """Compute what is reported with scikit-learn; the table's own formulas, made for resamples, are tested to agree."""
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    expected = expected_labels(answers, labels)
    given = [answer.label or NO_LABEL for answer in answers]
    averaged: dict[str, Any] = {"labels": sorted(set(expected)), "average": "macro", "zero_division": 0}
    return {
        "macro_recall": float(recall_score(expected, given, **averaged)),
        "accuracy": float(accuracy_score(expected, given)),
        "macro_f1": float(f1_score(expected, given, **averaged)),
    }


def _label_counts(answers: Sequence[Answer], labels: Sequence[str]) -> Floats:
    """Return per answer three one-hot rows of L labels (N × 3L): both expected and given, expected, given.

    Their sums are the diagonal and the margins of the confusion counts. No label is a row of zeros: a wrong answer.
    """
    index = {label: place for place, label in enumerate(labels)}
    counts_N3L = np.zeros((len(answers), 3, len(labels)))
    for row, (expected, answer) in enumerate(zip(expected_labels(answers, labels), answers, strict=True)):
        counts_N3L[row, 1, index[expected]] = 1
        if answer.label is not None:
            counts_N3L[row, 2, index[answer.label]] = 1
            counts_N3L[row, 0, index[expected]] = answer.label == expected
    return counts_N3L.reshape(len(answers), 3 * len(labels))


def _counts(sums_RK: Floats) -> tuple[Floats, Floats, Floats]:
    right_RL, expected_RL, given_RL = np.split(sums_RK, 3, axis=1)
    return right_RL, expected_RL, given_RL


def _macro_recall(sums_RK: Floats) -> Floats:
    right_RL, expected_RL, _ = _counts(sums_RK)
    return _mean_where(_ratio(right_RL, expected_RL), expected_RL > 0)


def _accuracy(sums_RK: Floats) -> Floats:
    right_RL, expected_RL, _ = _counts(sums_RK)
    return _ratio(right_RL.sum(axis=1), expected_RL.sum(axis=1))


def _macro_f1(sums_RK: Floats) -> Floats:
    right_RL, expected_RL, given_RL = _counts(sums_RK)
    return _mean_where(_ratio(2 * right_RL, expected_RL + given_RL), expected_RL > 0)


def _answered(sums_RK: Floats) -> Floats:
    _, expected_RL, given_RL = _counts(sums_RK)
    return _ratio(given_RL.sum(axis=1), expected_RL.sum(axis=1))


def _bleu_counts(answers: Sequence[Answer], _labels: Sequence[str]) -> Floats:
    return _rows([_bleu_of(answer.text, answer.expected) for answer in answers], 2 + 2 * NGRAM_ORDERS)


@lru_cache(maxsize=TEXTS_REMEMBERED)  # every comparison of two contestants asks for the same texts again
def _bleu_of(text: str, expected: str) -> tuple[int, ...]:
    """Return (length, reference length, matching n-grams of order 1 to 4, n-grams of order 1 to 4)."""
    sentence = _bleu_scorer().sentence_score(text, [expected])
    return (sentence.sys_len, sentence.ref_len, *sentence.counts, *sentence.totals)


@lru_cache(maxsize=1)
def _bleu_scorer() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)  # changes no count; without it sacrebleu warns at each sentence


def _bleu(sums_RK: Floats) -> Floats:
    """Return corpus BLEU / 100 as sacrebleu has it by default: 13a tokens, order 4, exponential smoothing.

    Papineni et al., "BLEU", 2002, section 2.3; smoothing: method 3 of Chen and Cherry, 2014: the k-th order without
    a match counts as 1 / 2^k matches. 0 where nothing matches, or where no answer has four tokens.
    """
    lengths_R, references_R = sums_RK[:, 0], sums_RK[:, 1]
    matches_RO, totals_RO = sums_RK[:, 2 : 2 + NGRAM_ORDERS], sums_RK[:, 2 + NGRAM_ORDERS :]
    missing_RO = matches_RO == 0
    smoothed_RO = np.where(missing_RO, 0.5 ** missing_RO.cumsum(axis=1), matches_RO)
    defined_R = np.asarray(matches_RO.any(axis=1) & (totals_RO > 0).all(axis=1))
    precisions_RO = np.where(defined_R.reshape(-1, 1), _ratio(smoothed_RO, totals_RO), 1.0)
    brevity_R = np.minimum(0.0, 1 - _ratio(references_R, lengths_R))
    return np.where(defined_R, np.exp(brevity_R + np.log(precisions_RO).mean(axis=1)), 0.0)


def _rouge_l_scores(answers: Sequence[Answer], _labels: Sequence[str]) -> Floats:
    return _rows([(_rouge_l_of(answer.text, answer.expected), 1.0) for answer in answers], 2)


@lru_cache(maxsize=TEXTS_REMEMBERED)
def _rouge_l_of(text: str, expected: str) -> float:
    return float(_rouge_scorer().score(expected, text)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_UnicodeWords())


class _UnicodeWords:
    """Words of letters and digits of any script, in lower case and not stemmed.

    rouge_score's own tokenizer knows only a-z: it scores an answer in Greek 0 and cuts "café" to "caf". On ASCII text
    both give the same words.
    """

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _exact_matches(answers: Sequence[Answer], _labels: Sequence[str]) -> Floats:
    return _rows([(answer.text.split() == answer.expected.split(), 1.0) for answer in answers], 2)


def _average(sums_RK: Floats) -> Floats:
    return _ratio(sums_RK[:, 0], sums_RK[:, 1])


def _logprob_sums(answers: Sequence[Answer], _labels: Sequence[str]) -> Floats:
    return _rows([(a.expected_logprob, a.expected_tokens) if has_logprob(a) else (0, 0) for a in answers], 2)


def has_logprob(answer: Answer) -> bool:
    """Return whether the expected answer's log-probability under the model was measured."""
    return answer.expected_logprob is not None and bool(answer.expected_tokens)


def _perplexity(sums_RK: Floats) -> Floats:
    return np.exp(-_ratio(sums_RK[:, 0], sums_RK[:, 1]))


def _rows(rows: Sequence[Sequence[Any]], width: int) -> Floats:
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def _ratio(above: Floats, below: Floats) -> Floats:
    """Divide; NaN where there is nothing to divide by."""
    result = np.full(above.shape, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result


def _mean_where(values_RL: Floats, chosen_RL: npt.NDArray[np.bool_]) -> Floats:
    """Return each row's mean of the chosen values."""
    return _ratio(np.where(chosen_RL, values_RL, 0.0).sum(axis=1), chosen_RL.sum(axis=1).astype(np.float64))


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "macro_recall",
            "label",
            "share of right answers per label, averaged over the labels that are expected (balanced accuracy)",
            _label_counts,
            _macro_recall,
        ),
        Metric("accuracy", "label", "share of right answers; no label is a wrong answer", _label_counts, _accuracy),
        Metric(
            "macro_f1",
            "label",
            "harmonic mean of precision and recall per label, averaged over the labels that are expected",
            _label_counts,
            _macro_f1,
        ),
        Metric(
            "answered",
            "label",
            "share of answers from which a label could be read",
            _label_counts,
            _answered,
        ),
        Metric("bleu", "text", "corpus BLEU of sacrebleu, divided by 100", _bleu_counts, _bleu),
        Metric("rouge_l", "text", "ROUGE-L F1 per answer, averaged; words are not stemmed", _rouge_l_scores, _average),
        Metric(
            "exact_match",
            "text",
            "share of answers that are the expected text up to white space",
            _exact_matches,
            _average,
        ),
        Metric(
            "perplexity",
            None,
            "exp of the mean negative log-probability per token of the expected answers, where it was measured; "
            "compare it only between models with the same tokenizer",
            _logprob_sums,
            _perplexity,
            higher_is_better=False,
        ),
    )
}
