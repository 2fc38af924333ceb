"""Grade one sample: a grader, an item and what a model answered come in; a score goes out, or why there is none."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import InputError
from luthier.evaluate.graders.failure import GradingError
from luthier.evaluate.graders.formula import Formula
from luthier.evaluate.graders.judge import label_request, read_label, read_score, score_request
from luthier.evaluate.graders.similarity import cosine, similarity, string_check
from luthier.evaluate.graders.template import render
from luthier.evaluate.sandbox.sandbox import CodeError, Sandbox
from luthier.records.grader import (
    Grader,
    GradingErrorKind,
    LabelModelGrader,
    MultiGrader,
    PythonGrader,
    ScoreModelGrader,
    StringCheckGrader,
    TextSimilarityGrader,
)

Json = dict[str, Any]
DEFAULT_PASS_THRESHOLD = 0.5
CODE_ERRORS: dict[str, GradingErrorKind] = {"result": "unresponsive_reward_error"}


@dataclass(frozen=True)
class Tools:
    """What graders need of others.

    ``ask`` sends a request to ``/v1/chat/completions`` and returns the completion; ``embed`` returns a vector for every
    text. Both raise :class:`GradingError` where they cannot.
    """

    ask: Callable[[Json], Awaitable[Json]]
    embed: Callable[[Sequence[str]], Awaitable[list[list[float]]]]
    sandbox: Sandbox


@dataclass(frozen=True)
class Exchange:
    """What a model that graded was asked and answered."""

    model: str
    request: Json
    completion: Json


@dataclass(frozen=True)
class Grade:
    """What a grader says. Where it says nothing, ``failures`` has the reasons, and the score is 0."""

    score: float = 0.0
    passed: bool = False
    seconds: float = 0.0
    failures: tuple[GradingError, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    parts: Mapping[str, Grade] = field(default_factory=dict)

    @property
    def is_error(self) -> bool:
        """Whether something else than the sample is to blame that there is no score."""
        return any(not failure.is_of_sample for failure in self.failures)


def sample_of(text: str, tool_calls: Sequence[Any] = (), choices: Sequence[Any] | None = None) -> Json:
    """Return the ``sample`` that templates and code see. ``output_json`` is there where the text is JSON."""
    message: Json = {"role": "assistant", "content": text} | ({"tool_calls": list(tool_calls)} if tool_calls else {})
    sample: Json = {
        "output_text": text,
        "output_tools": list(tool_calls),
        "choices": list(choices) if choices is not None else [{"index": 0, "message": message}],
    }
    try:
        return sample | {"output_json": json.loads(text)}
    except (ValueError, RecursionError):
        return sample


async def grade(grader: Grader, item: Mapping[str, Any], sample: Mapping[str, Any], tools: Tools) -> Grade:
    """Grade a sample. It never raises for what a grader, its model or its code does.

    Raises:
        MissingDependencyError: the grader is Python, and there is no sandbox on this machine.
    """
    started = time.monotonic()
    namespace = {"item": item, "sample": sample}
    exchanges: list[Exchange] = []
    parts: dict[str, Grade] = {}
    failures: tuple[GradingError, ...] = ()
    score = 0.0
    try:
        if isinstance(grader, MultiGrader):
            parts = await _parts(grader, item, sample, tools)
            failures = tuple(failure for part in parts.values() for failure in part.failures)
            score = _combined(grader, {name: part.score for name, part in parts.items()})
        else:
            score = await _score(grader, namespace, tools, exchanges)
    except GradingError as error:
        failures = (*failures, error)
    return Grade(
        score=score,
        passed=not failures and passes(grader, score),
        seconds=time.monotonic() - started,
        failures=failures,
        exchanges=(*exchanges, *(exchange for part in parts.values() for exchange in part.exchanges)),
        parts=parts,
    )


def passes(grader: Grader, score: float) -> bool:
    """Whether a score is enough: for checks and labels 1; else the threshold, or the middle of the range."""
    if isinstance(grader, StringCheckGrader | LabelModelGrader):
        return score == 1.0
    threshold = None if isinstance(grader, MultiGrader) else grader.pass_threshold
    if threshold is None:
        threshold = sum(grader.bounds) / 2 if isinstance(grader, ScoreModelGrader) else DEFAULT_PASS_THRESHOLD
    return score >= threshold


async def _score(grader: Grader, namespace: Json, tools: Tools, exchanges: list[Exchange]) -> float:
    async def ask(request: Json) -> Json:
        completion = await tools.ask(request)
        exchanges.append(Exchange(request["model"], request, completion))
        return completion

    if isinstance(grader, StringCheckGrader | TextSimilarityGrader):
        # A template with loops may take long: in a thread, the service goes on meanwhile.
        text = await asyncio.to_thread(render, grader.input, namespace)
        reference = await asyncio.to_thread(render, grader.reference, namespace)
        if isinstance(grader, StringCheckGrader):
            return await asyncio.to_thread(string_check, grader.operation, text, reference)
        return await _alike(grader, text, reference, tools)
    if isinstance(grader, LabelModelGrader):
        completion = await ask(await asyncio.to_thread(label_request, grader, namespace))
        return float(read_label(grader, completion) in grader.passing_labels)
    if isinstance(grader, ScoreModelGrader):
        return read_score(grader, await ask(await asyncio.to_thread(score_request, grader, namespace)))
    assert isinstance(grader, PythonGrader)  # noqa: S101 - the only one that is left
    try:
        return await tools.sandbox.grade(grader.source, namespace["sample"], namespace["item"])
    except CodeError as error:
        raise GradingError(CODE_ERRORS.get(error.kind, "python_grader_runtime_error"), str(error)) from error


async def _alike(grader: TextSimilarityGrader, text: str, reference: str, tools: Tools) -> float:
    if grader.evaluation_metric == "cosine":
        if not text or not reference:  # an empty text has no vector
            return float(text == reference)
        one, other = await tools.embed([text, reference])
        return cosine(one, other)
    return await asyncio.to_thread(similarity, grader.evaluation_metric, text, reference)


async def _parts(
    grader: MultiGrader, item: Mapping[str, Any], sample: Mapping[str, Any], tools: Tools
) -> dict[str, Grade]:
    grades = await asyncio.gather(*(grade(part, item, sample, tools) for part in grader.graders.values()))
    return dict(zip(grader.graders, grades, strict=True))


def _combined(grader: MultiGrader, scores: Mapping[str, float]) -> float:
    try:
        return Formula(grader.calculate_output, grader.graders).value(scores)
    except InputError as error:
        raise GradingError("formula_parse_error", str(error)) from error
