"""Models that grade: what they are asked, and how their answer is read. They are bound to answer in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from luthier.evaluate.graders.failure import GradingError
from luthier.evaluate.graders.template import render
from luthier.records.grader import LabelModelGrader, ScoreModelGrader

Body = dict[str, Any]
SHOWN_LETTERS = 200


def label_request(grader: LabelModelGrader, namespace: Mapping[str, Any]) -> Body:
    """Return the request to ``/v1/chat/completions`` that asks for a label.

    Raises:
        GradingError: a value that the messages name is not there.
    """
    listed = ", ".join(json.dumps(label, ensure_ascii=False) for label in grader.labels)
    schema = {"type": "string", "enum": list(grader.labels)}
    return {
        "model": grader.model,
        "messages": _messages(
            grader, namespace, f'Answer with JSON: {{"label": …}}, where the label is one of {listed}.'
        ),
        "response_format": _only("label", schema),
        "temperature": 0.0,
    }


def read_label(grader: LabelModelGrader, completion: Body) -> str:
    """Return the label in an answer.

    Raises:
        GradingError: there is none of the grader's.
    """
    label = _answered(completion, "label")
    if label not in grader.labels:
        raise GradingError("model_grader_parse_error", f"The model answered {_shown(label)}, which is no label.")
    return str(label)


def score_request(grader: ScoreModelGrader, namespace: Mapping[str, Any]) -> Body:
    """Return the request to ``/v1/chat/completions`` that asks for a score.

    Raises:
        GradingError: a value that the messages name is not there.
    """
    low, high = grader.bounds
    request = {
        "model": grader.model,
        "messages": _messages(
            grader, namespace, f'Answer with JSON: {{"score": …}}, a number from {low:g} to {high:g}.'
        ),
        "response_format": _only("score", {"type": "number"}),
        "temperature": 0.0,
    }
    sampling = grader.sampling_params.model_dump(exclude_none=True) if grader.sampling_params else {}
    if "max_completions_tokens" in sampling:
        sampling["max_completion_tokens"] = sampling.pop("max_completions_tokens")
    return request | sampling


def read_score(grader: ScoreModelGrader, completion: Body) -> float:
    """Return the score in an answer.

    Raises:
        GradingError: there is none, or it is out of the grader's range.
    """
    score = _answered(completion, "score")
    low, high = grader.bounds
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise GradingError("model_grader_parse_error", f"The model answered {_shown(score)}, which is no score.")
    if not low <= score <= high:
        message = f"The model answered the score {score:g}, which is not within {low:g} to {high:g}."
        raise GradingError("model_grader_parse_error", message)
    return float(score)


def _messages(
    grader: LabelModelGrader | ScoreModelGrader, namespace: Mapping[str, Any], instruction: str
) -> list[dict[str, str]]:
    """Return the grader's messages; what form the answer has is said at the end of the first, a system's."""
    messages = [{"role": message.role, "content": render(message.text, namespace)} for message in grader.input]
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": instruction}, *messages]
    return [messages[0] | {"content": f"{messages[0]['content']}\n\n{instruction}"}, *messages[1:]]


def _only(name: str, schema: Body) -> Body:
    whole = {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": name, "schema": whole, "strict": True}}


def _answered(completion: Body, name: str) -> Any:
    choice = completion["choices"][0]
    message = choice["message"]
    if message.get("refusal"):
        raise GradingError("model_grader_refusal_error", f"The model refused: {message['refusal'][:SHOWN_LETTERS]}")
    try:
        return json.loads(message.get("content") or "")[name]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        cut = ", and was cut off at its length" if choice.get("finish_reason") == "length" else ""
        what = f"The model answered {_shown(message.get('content'))}, which has no {name}{cut}."
        raise GradingError("model_grader_parse_error", what) from None


def _shown(value: Any) -> str:
    return repr(value)[:SHOWN_LETTERS]
