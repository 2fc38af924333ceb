"""Finds the best few-shot prompt of a model: the rival that a tuned model has to beat.

In: training conversations to take shots from, validation conversations to choose on. Out: the winning shots and the
score of everything that was tried (:class:`~luthier.records.evaluation.FewShotChoice`). Test examples play no part.

How many shots, which ones and in which order move the result by tens of points (Zhao et al., "Calibrate Before Use",
2021, section 3), so several numbers are tried with two draws each. The prompt without shots is not among them: it is
a contestant of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from statistics import median

import numpy as np

from luthier.errors import CapacityError, InputError
from luthier.evaluate.contest import OnProgress, answers_of, with_shots
from luthier.evaluate.labels import label_named
from luthier.evaluate.metrics import Metric, metric_named, value_of
from luthier.llm.model import LanguageModel
from luthier.records.completion import Sampling
from luthier.records.evaluation import Answer, FewShotChoice, TaskKind
from luthier.records.example import Conversation, Message

__all__ = ["Shots", "candidates", "choose", "with_shots"]

Shots = tuple[Message, ...]
PER_LABEL = (1, 2, 4)
PER_TEXT_PROMPT = (1, 3, 5)
MAX_LABEL_SHOTS = 16
DRAWS = 2


def candidates(
    train: Sequence[Conversation], task: TaskKind, labels: Sequence[str] = (), seed: int = 0
) -> dict[str, Shots]:
    """Return named few-shot prompts drawn from training examples, smaller ones first.

    Label tasks: 1, 2 or 4 examples of each label, at most 16 in all (with more than 16 labels: one each of 16 of
    them), in random order. Text tasks: 1, 3 or 5 examples. Two draws of each; those that come out the same are
    dropped. Only examples of at most the median length (of their label) are drawn, so that prompts stay small.

    Raises:
        InputError: no training example can be a shot.
    """
    groups = _by_label(train, labels) if task == "label" else {"": list(train)}
    pools = [_shorter_half(group) for group in groups.values() if group]
    if not pools:
        what = "has one of the labels as its answer" if train else "is given"
        raise InputError(f"There is nothing to make a few-shot prompt of: no training example {what}.")
    named: dict[str, Shots] = {}
    for count in _counts(task, pools):
        for draw in range(1, DRAWS + 1):
            shots = _drawn(pools, count, np.random.default_rng([seed, count, draw]))
            if shots not in named.values():
                named[_name(task, len(pools), count, draw)] = shots
    return named


def choose(
    model: LanguageModel,
    candidates: Mapping[str, Shots],
    validation: Sequence[Conversation],
    sampling: Sampling,
    task: TaskKind,
    labels: Sequence[str],
    metric: str,
    on_progress: OnProgress | None = None,
) -> FewShotChoice:
    """Return the candidate with the best validation score; of equals, the one with the shortest text.

    A candidate whose prompts do not fit the model's context is left out of ``tried``. ``on_progress(done, total)``
    counts requests over all candidates.

    Raises:
        InputError: there are no candidates or validation examples, or the metric is none of the task or not
            defined here.
        CapacityError: no candidate fits the model's context.
        EngineError: the model failed.
    """
    chosen = metric_named(metric, task)
    if not candidates or not validation:
        raise InputError("A few-shot prompt is chosen from one candidate or more on one validation example or more.")
    tried: dict[str, float] = {}
    misfits: list[str] = []
    for place, (name, shots) in enumerate(candidates.items()):
        progress = _part_of(on_progress, place, len(candidates))
        try:
            answers = answers_of(name, model, validation, sampling, task, labels, shots, progress)
        except (InputError, CapacityError) as error:
            misfits.append(f"{name}: {error.message}")
        else:
            tried[name] = _defined_value(chosen, answers, labels)
    if not tried:
        raise CapacityError("No few-shot prompt fits the model's context.", problems=misfits)
    sign = 1 if chosen.higher_is_better else -1
    best = min(tried, key=lambda name: (-sign * tried[name], _characters(candidates[name])))
    return FewShotChoice(
        shots=candidates[best], validation_score=tried[best], validation_examples=len(validation), tried=tried
    )


def _by_label(train: Sequence[Conversation], labels: Sequence[str]) -> dict[str, list[Conversation]]:
    groups: dict[str, list[Conversation]] = {label: [] for label in labels}
    for conversation in train:
        if (label := label_named(conversation.answer, labels)) is not None:
            groups[label].append(conversation)
    return groups


def _shorter_half(group: Sequence[Conversation]) -> list[Shots]:
    """Return the turns of the conversations that have at most the median number of characters."""
    turns = [tuple(message for message in conversation.messages if message.role != "system") for conversation in group]
    limit = median(map(_characters, turns))
    return [shots for shots in turns if _characters(shots) <= limit]


def _counts(task: TaskKind, pools: Sequence[Sequence[Shots]]) -> list[int]:
    """Return how many examples to draw from each pool, smallest first, as far as there are so many."""
    most = max(map(len, pools))
    if task == "text":
        return sorted({min(count, most) for count in PER_TEXT_PROMPT})
    return sorted({min(count, most, max(1, MAX_LABEL_SHOTS // len(pools))) for count in PER_LABEL})


def _drawn(pools: Sequence[Sequence[Shots]], count: int, generator: np.random.Generator) -> Shots:
    """Return ``count`` examples of each pool (of at most 16 pools), shuffled together, as one run of messages."""
    chosen = generator.permutation(len(pools))[:MAX_LABEL_SHOTS]
    drawn = [pools[pool][place] for pool in chosen for place in generator.permutation(len(pools[pool]))[:count]]
    return tuple(message for place in generator.permutation(len(drawn)) for message in drawn[place])


def _name(task: TaskKind, pools: int, count: int, draw: int) -> str:
    if task == "text":
        return f"{count} {'example' if count == 1 else 'examples'}, draw {draw}"
    if pools > MAX_LABEL_SHOTS:
        return f"{MAX_LABEL_SHOTS} labels, draw {draw}"
    return f"{count} per label, draw {draw}"


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


def _defined_value(metric: Metric, answers: Sequence[Answer], labels: Sequence[str]) -> float:
    value = value_of(metric, answers, labels)
    if isnan(value):
        raise InputError(f"{metric.name} is not defined for answers alone; choose the prompt by another metric.")
    return value


def _part_of(on_progress: OnProgress | None, part: int, parts: int) -> OnProgress | None:
    """Return a callback for one of several equal parts of the work that reports on the whole."""
    if on_progress is None:
        return None
    report = on_progress
    return lambda done, total: report(part * total + done, parts * total)
