"""Graders as OpenAI's clients use them: read, check, run one on a sample; and what they need of the service."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, get_args

from luthier.errors import InputError, MissingDependencyError
from luthier.evaluate.graders.failure import GradingError
from luthier.evaluate.graders.formula import Formula
from luthier.evaluate.graders.grading import Exchange, Grade, Tools, grade, sample_of
from luthier.evaluate.graders.template import check_template
from luthier.evaluate.sandbox.sandbox import CodeError, Sandbox
from luthier.jobs.resident_context import Answer
from luthier.records.grader import (
    GRADERS,
    Grader,
    GradingErrorKind,
    LabelModelGrader,
    MultiGrader,
    PythonGrader,
    ScoreModelGrader,
    StringCheckGrader,
    TextSimilarityGrader,
)
from luthier.serve.api_error import ApiError
from luthier.serve.field_errors import Place
from luthier.store.store import Store
from luthier.workflows.written import read_written, refused

Json = dict[str, Any]
Ask = Callable[[str, Json], Awaitable[Answer]]
SANDBOX = Sandbox()
CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
DEFAULT_ENCODER = "minilm-l6"
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
ALL_KINDS: tuple[GradingErrorKind, ...] = get_args(GradingErrorKind)


def read_grader(written: Any, place: Place, kinds: Sequence[str] = tuple(GRADERS)) -> Grader:
    """Return a grader as its record, with all that can be seen without running it.

    Args:
        written: What the client sent.
        place: Where it stands in the request.
        kinds: Which may stand there.

    Raises:
        ApiError: 400; it names the field.
    """
    known = {kind: GRADERS[kind] for kind in kinds}
    if isinstance(written, dict) and written.get("type") == "multi" and "multi" in known:
        written = written | {"graders": _read_parts(written.get("graders"), (*place, "graders"))}
    grader = read_written(known, written, place)
    _check_fields(grader, place)
    return grader


async def check_grader(store: Store, grader: Grader, place: Place) -> None:
    """Refuse a grader that cannot work here: its code does not define ``grade``, or a package or model is missing.

    Raises:
        ApiError: 400; it names the field.
    """
    if isinstance(grader, MultiGrader):
        for name, part in grader.graders.items():
            await check_grader(store, part, (*place, "graders", name))
    elif isinstance(grader, PythonGrader):
        try:
            await SANDBOX.check(grader.source)
        except (CodeError, MissingDependencyError) as error:
            raise refused((*place, "source"), str(error)) from error
    elif isinstance(grader, TextSimilarityGrader) and grader.evaluation_metric == "cosine":
        await asyncio.to_thread(_check_encoder, store, (*place, "evaluation_metric"))


async def run_grader(store: Store, ask: Ask, written: Json, model_sample: str, item: Json) -> Json:
    """Grade one sample, and return OpenAI's ``GraderRunResponse``.

    Args:
        store: Where the models are.
        ask: Sends (path, body) to the service's own routes.
        written: The grader.
        model_sample: What a model answered.
        item: The row that it answered to.

    Raises:
        ApiError: 400 where the grader is not one, or cannot work here; 404 where its model does not exist.
    """
    grader = read_grader(written, ("grader",))
    await check_grader(store, grader, ("grader",))
    found = await grade(grader, item, sample_of(model_sample), tools_of(store, ask))
    usage = usage_by_model(found.exchanges)
    scores = {name: part.score for name, part in found.parts.items()} or {grader.name: found.score}
    return {
        "reward": found.score,
        "sub_rewards": scores if found.parts else {},
        "metadata": {
            "name": grader.name,
            "type": grader.type,
            "execution_time": round(found.seconds, 4),
            "scores": scores,
            "token_usage": sum(one["total_tokens"] for one in usage.values()) if usage else None,
            "sampled_model_name": next(iter(usage), None),
            "errors": _errors(found),
        },
        "model_grader_token_usage_per_model": usage,
    }


def tools_of(store: Store, ask: Ask) -> Tools:
    """Return what graders need, by way of the service's own routes."""
    return Tools(functools.partial(_complete, ask), functools.partial(_embed, store, ask), SANDBOX)


def encoder_of(store: Store) -> str | None:
    """Return the encoder that compares texts: the catalogue's own, or else the first that was pulled."""
    names = [base.id for base in store.models.bases() if base.kind == "encoder"]
    return DEFAULT_ENCODER if DEFAULT_ENCODER in names else next(iter(sorted(names)), None)


def usage_by_model(exchanges: Sequence[Exchange]) -> dict[str, dict[str, int]]:
    """Return the tokens that each model took."""
    totals: dict[str, Counter[str]] = {}
    for exchange in exchanges:
        usage = exchange.completion.get("usage") or {}
        counted = {name: int(usage.get(name) or 0) for name in USAGE}
        details = usage.get("prompt_tokens_details") or {}
        counted |= {"cached_tokens": int(details.get("cached_tokens") or 0), "invocation_count": 1}
        totals.setdefault(exchange.model, Counter()).update(counted)
    return {model: dict(total) for model, total in totals.items()}


def refusal_of(answer: Answer) -> str:
    """Return what a route said against a request."""
    error = answer.body.get("error") if isinstance(answer.body, dict) else None
    return str((error or {}).get("message") or f"status {answer.status}")


async def _complete(ask: Ask, request: Json) -> Json:
    answer = await ask(CHAT, request)
    if answer.status == 404:
        raise ApiError(404, refusal_of(answer), param="model", code="model_not_found")
    if answer.status != 200:
        raise GradingError("model_grader_server_error", f"{request['model']}: {refusal_of(answer)}")
    completion: Json = answer.body
    return completion


async def _embed(store: Store, ask: Ask, texts: Sequence[str]) -> list[list[float]]:
    encoder = await asyncio.to_thread(encoder_of, store)
    if encoder is None:
        raise GradingError("other_error", "cosine needs an encoder, and there is none here.")
    answer = await ask(EMBEDDINGS, {"model": encoder, "input": list(texts), "encoding_format": "float"})
    if answer.status != 200:
        raise GradingError("other_error", f"{encoder}: {refusal_of(answer)}")
    return [row["embedding"] for row in answer.body["data"]]


def _check_encoder(store: Store, place: Place) -> None:
    if encoder_of(store) is None:
        raise refused(place, f"cosine needs an encoder, and there is none here: luthier model pull {DEFAULT_ENCODER}")


def _read_parts(written: Any, place: Place) -> dict[str, Grader]:
    """Return the graders of a formula: an object of them, or, as the ``openai`` package types it, one."""
    if isinstance(written, dict) and isinstance(written.get("type"), str):
        written = {str(written.get("name")): written}
    if not isinstance(written, dict):
        raise refused(place, "must be an object of graders by the names that calculate_output uses")
    singles = [kind for kind in GRADERS if kind != "multi"]
    return {name: read_grader(part, (*place, name), singles) for name, part in written.items()}


def _check_fields(grader: Grader, place: Place) -> None:
    for field, text in _templates(grader).items():
        try:
            check_template(text, field)
        except InputError as error:
            raise refused((*place, *field.split(".")), str(error)) from error
    if isinstance(grader, LabelModelGrader):
        unknown = sorted(set(grader.passing_labels) - set(grader.labels))
        if unknown:
            raise refused((*place, "passing_labels"), f"{', '.join(unknown)}: not one of the labels")
    if isinstance(grader, ScoreModelGrader) and grader.bounds[0] >= grader.bounds[1]:
        raise refused((*place, "range"), "the first number must be smaller than the second")
    if isinstance(grader, MultiGrader):
        try:
            Formula(grader.calculate_output, grader.graders)
        except InputError as error:
            raise refused((*place, "calculate_output"), str(error)) from error


def _templates(grader: Grader) -> Mapping[str, str]:
    if isinstance(grader, StringCheckGrader | TextSimilarityGrader):
        return {"input": grader.input, "reference": grader.reference}
    if isinstance(grader, LabelModelGrader | ScoreModelGrader):
        return {f"input.{number}.content": message.text for number, message in enumerate(grader.input)}
    return {}


def _errors(found: Grade) -> Json:
    """Return OpenAI's table of what can go wrong, with what did."""
    kinds: dict[str, str] = {failure.kind: str(failure) for failure in found.failures}
    return {
        **{kind: kind in kinds for kind in ALL_KINDS},
        "python_grader_runtime_error_details": kinds.get("python_grader_runtime_error"),
        "python_grader_server_error": False,
        "python_grader_server_error_type": None,
        "model_grader_server_error_details": kinds.get("model_grader_server_error"),
        "truncated_observation_error": False,
        "details": "; ".join(kinds.values()) or None,
    }
