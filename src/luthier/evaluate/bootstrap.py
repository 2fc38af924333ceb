"""How sure is it that one contestant is better: a paired bootstrap interval of the difference of a metric.

In: the answers of two contestants to the same examples. Out: :class:`~luthier.records.evaluation.Difference`.

The examples are drawn anew, with replacement, many times; each time both contestants are scored on the same draw, so
that what makes an example hard for both cancels out (Koehn, "Statistical significance tests for machine translation
evaluation", 2004). The interval is the percentile one (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
section 13.3). It speaks of other examples like these, not of another seed of training or other data.

A draw is a count per example, so a metric on R draws is one matrix product of counts and statistics
(see :mod:`luthier.evaluate.metrics`).

Dimensions in array names: N examples, R resamples, K statistics of a metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from luthier.errors import InputError
from luthier.evaluate.metrics import Floats, Metric, has_logprob, metric_named, value_of
from luthier.records.evaluation import Answer, Difference, TaskKind

RESAMPLES = 2000
CELLS_AT_ONCE = 1 << 22  # counts of a block of resamples: 32 MiB


def paired_difference(
    better_answers: Sequence[Answer],
    worse_answers: Sequence[Answer],
    metric: str,
    task: TaskKind,
    labels: Sequence[str] = (),
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return ``better - worse`` of a metric on all examples, with its percentile interval, in the metric's unit.

    ``better`` and ``worse`` are only names: the difference is negative if it is the other way round, and for
    perplexity, where less is better, a negative one is a gain. Perplexity is compared over the examples where both
    have log-probabilities. The same seed draws the same examples, whatever the contestants and the metric.

    Raises:
        InputError: the answers do not pair up by example, the metric is none of the task or defined on none of them,
            or an option is out of its range.
    """
    chosen = metric_named(metric, task)
    _check_options(resamples, confidence)
    better, worse = _paired(better_answers, worse_answers)
    if chosen.name == "perplexity":
        better, worse = _with_logprobs(better, worse)
    differences_R = _resampled_differences(better, worse, chosen, labels, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences_R, [tail, 1 - tail])
    return Difference(
        contestant=better[0].contestant,
        baseline=worse[0].contestant,
        metric=metric,
        value=value_of(chosen, better, labels) - value_of(chosen, worse, labels),
        low=float(low),
        high=float(high),
        confidence=confidence,
        resamples=resamples,
    )


def _resampled_differences(
    better: Sequence[Answer], worse: Sequence[Answer], metric: Metric, labels: Sequence[str], resamples: int, seed: int
) -> Floats:
    better_NK, worse_NK = metric.statistics(better, labels), metric.statistics(worse, labels)
    blocks = [
        metric.value(counts_RN @ better_NK) - metric.value(counts_RN @ worse_NK)
        for counts_RN in _draws(len(better), resamples, seed)
    ]
    return np.concatenate(blocks)


def _draws(examples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield blocks of resamples as counts: how often each example was drawn (R × N, every row sums to N)."""
    generator = np.random.default_rng(seed)
    block = max(1, CELLS_AT_ONCE // examples)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn_RN = generator.integers(0, examples, size=(rows, examples))
        cells = (drawn_RN + examples * np.arange(rows)[:, None]).ravel()
        yield np.bincount(cells, minlength=rows * examples).reshape(rows, examples).astype(np.float64)


def _paired(better: Sequence[Answer], worse: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Return both contestants' answers in the order of the first."""
    by_id = {answer.example_id: answer for answer in worse}
    ids = [answer.example_id for answer in better]
    problems = [f"{name} answers one example twice" for name, answers in _named(better, worse) if _repeats(answers)]
    problems += [f"{example} is answered by one of the two only" for example in sorted(set(ids) ^ set(by_id))]
    problems += [
        f"{answer.example_id} has two expected answers"
        for answer in better
        if answer.example_id in by_id and by_id[answer.example_id].expected != answer.expected
    ]
    if problems or not ids:
        raise InputError("The answers do not pair up by example.", problems=problems or ["there are no answers"])
    return list(better), [by_id[example] for example in ids]


def _named(better: Sequence[Answer], worse: Sequence[Answer]) -> list[tuple[str, Sequence[Answer]]]:
    return [(answers[0].contestant, answers) for answers in (better, worse) if answers]


def _repeats(answers: Sequence[Answer]) -> bool:
    return len({answer.example_id for answer in answers}) < len(answers)


def _with_logprobs(better: Sequence[Answer], worse: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    both = [pair for pair in zip(better, worse, strict=True) if all(map(has_logprob, pair))]
    if not both:
        raise InputError("Perplexity cannot be compared: no example has log-probabilities from both contestants.")
    return [first for first, _ in both], [second for _, second in both]


def _check_options(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise InputError(f"resamples must be 1 or more, not {resamples}.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, not at {confidence}.")
