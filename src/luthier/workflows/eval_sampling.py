"""Ask the model that a run tests: what it is asked for an item, and what its answer is as a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from luthier.evaluate.graders.failure import GradingError
from luthier.evaluate.graders.grading import sample_of
from luthier.evaluate.graders.template import look_up, render
from luthier.records.eval import InputMessages, ItemReference, ModelTally, SamplingParams
from luthier.workflows.graders import CHAT

Json = dict[str, Any]
RESPONSES = "/v1/responses"
DEFAULT_SEED = 42  # as at OpenAI
NO_SEED = 0  # the package's type knows no null
LOGGED_INPUT = ItemReference(type="item_reference", item_reference="item.input")
SHARED = ("temperature", "top_p", "tools")
FINISH_REASONS = {"completed": "stop", "incomplete": "length"}
NO_ERROR = {"code": "", "message": ""}  # the package's type knows no null


def asked_messages(messages: InputMessages, item: Json) -> list[Json]:
    """Return the messages to a model for an item.

    Raises:
        GradingError: the item lacks what they name.
    """
    namespace = {"item": item}
    if not isinstance(messages, ItemReference):
        return [{"role": one.role, "content": render(one.text, namespace)} for one in messages.template]
    try:
        found = look_up(messages.item_reference, namespace)
    except LookupError:
        raise GradingError("invalid_variable_error", f"There is no {messages.item_reference}.") from None
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    if isinstance(found, list) and found and all(isinstance(one, dict) and "role" in one for one in found):
        return found
    what = f"{messages.item_reference} must be a text or a list of messages."
    raise GradingError("invalid_variable_error", what)


def request_of(model: str, messages: list[Json], params: SamplingParams, *, responses: bool) -> tuple[str, Json]:
    """Return the path and the body of the request for a sample."""
    given = params.model_dump(exclude_none=True)
    body: Json = {"model": model} | {name: given[name] for name in SHARED if name in given}
    if responses:
        body["input"] = messages
        body |= {"max_output_tokens": given["max_completion_tokens"]} if "max_completion_tokens" in given else {}
        body |= {"reasoning": {"effort": given["reasoning_effort"]}} if "reasoning_effort" in given else {}
        body |= {"text": given["text"]} if "text" in given else {}
        return RESPONSES, body | {"store": False}
    body |= {"messages": messages, "seed": _seed(params)}
    more = ("max_completion_tokens", "response_format", "reasoning_effort")
    return CHAT, body | {name: given[name] for name in more if name in given}


def read_answer(body: Json, *, responses: bool) -> Json:
    """Return a model's answer as the ``sample`` that graders see."""
    if not responses:
        choice = body["choices"][0]
        message = choice["message"]
        sample = sample_of(message.get("content") or "", message.get("tool_calls") or (), body["choices"])
        return sample | {"model": body["model"], "finish_reason": choice["finish_reason"]}
    text = "".join(one["content"] for one in plain_messages(body["output"]))
    calls = [_call(one) for one in body["output"] if one["type"] == "function_call"]
    finish = FINISH_REASONS.get(body.get("status", ""), "stop")
    return sample_of(text, calls) | {"model": body["model"], "finish_reason": "tool_calls" if calls else finish}


def usage_of(body: Json) -> ModelTally:
    """Return the tokens that an answer took, of either route."""
    usage = body.get("usage") or {}
    prompt = int(usage.get("prompt_tokens") or usage.get("input_tokens") or 0)
    completion = int(usage.get("completion_tokens") or usage.get("output_tokens") or 0)
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return ModelTally(
        invocation_count=1,
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        cached_tokens=int(details.get("cached_tokens") or 0),
    )


def shown_sample(
    messages: list[Json],
    sample: Mapping[str, Any],
    params: SamplingParams,
    used: ModelTally,
    error: Json | None = None,
    *,
    seeded: bool,
) -> Json:
    """Return a sample as an output item shows it; numbers that nobody chose are those that hold by default.

    ``seeded`` says whether a model was asked with a seed.
    """
    output = [choice.get("message") or {} for choice in sample.get("choices") or ()]
    return {
        "input": [_shown(one) for one in messages],
        "output": [_shown(one) for one in output],
        "finish_reason": str(sample.get("finish_reason") or ("" if error else "stop")),
        "model": str(sample.get("model") or ""),
        "usage": used.model_dump(exclude={"invocation_count"}),
        "error": error or NO_ERROR,
        "temperature": params.temperature if params.temperature is not None else 1.0,
        "top_p": params.top_p if params.top_p is not None else 1.0,
        "seed": _seed(params) if seeded else NO_SEED,
        "max_completion_tokens": params.max_completion_tokens or 0,
    }


def plain_messages(items: Iterable[Json]) -> list[Json]:
    """Return those items of a response that are messages, each with its text."""
    return [_shown(one) for one in items if one.get("type", "message") == "message"]


def _seed(params: SamplingParams) -> int:
    return DEFAULT_SEED if params.seed is None else params.seed


def _shown(message: Json) -> Json:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    shown = {"role": str(message.get("role") or "assistant"), "content": str(content or "")}
    return shown | ({"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {})


def _call(item: Json) -> Json:
    """Return a call in the form that chat completions have."""
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}
