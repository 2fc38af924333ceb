from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.errors import BusyError, CapacityError, ConflictError, EngineError, InputError, LuthierError, NotFoundError
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.records.example import Message
from luthier.serve.api_error import ApiError, as_api_error
from luthier.serve.chat import complete_chat, prepare_chat, stream_chat
from luthier.serve.chat_request import ChatRequest, refuse_unsupported
from luthier.serve.field_errors import field_error
from luthier.serve.pool import LoadedModel
from luthier.templates.chat_format import ChatFormat

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SHORT = HELLO | {"max_tokens": 6, "temperature": 0}


def parse_chat_request(body: Any) -> ChatRequest:
    """Parse a body as the route does."""
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise field_error(error.errors()) from error
    refuse_unsupported(request)
    return request


def with_model(folder: Path, scenario: Callable[[LoadedModel], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        engine = await EngineProcess.start(folder, EngineOptions(precision="float32"))
        try:
            return await scenario(LoadedModel(engine, ChatFormat.load(folder)))
        finally:
            await engine.close()

    return asyncio.run(main())


def complete(folder: Path, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    async def scenario(loaded: LoadedModel) -> list[dict[str, Any]]:
        return [await complete_chat(prepare_chat(parse_chat_request(body), loaded)) for body in bodies]

    answers: list[dict[str, Any]] = with_model(folder, scenario)
    return answers


def stream(folder: Path, body: dict[str, Any]) -> list[dict[str, Any]]:
    async def scenario(loaded: LoadedModel) -> list[dict[str, Any]]:
        return [chunk async for chunk in stream_chat(prepare_chat(parse_chat_request(body), loaded))]

    chunks: list[dict[str, Any]] = with_model(folder, scenario)
    return chunks


@pytest.mark.parametrize(
    ("option", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_json": {}}, "guided_json"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(option: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(HELLO | option)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param.partition("[")[0] in caught.value.message


def test_a_missing_field_is_told_as_missing() -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request({"messages": HELLO["messages"]})
    assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


def test_options_that_do_not_change_the_answer_are_tolerated() -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "reasoning_effort": "none",
        "verbosity": "medium",
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_key": "x",
        "prompt_cache_retention": "24h",
        "safety_identifier": "x",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "top_logprobs": 0,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
        "never_heard_of": 1,
        "stop": None,
    }
    assert parse_chat_request(HELLO | harmless).include_usage


def test_roles_and_parts_become_messages() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    request = parse_chat_request(
        HELLO
        | {"messages": [{"role": "developer", "content": "rule"}, {"role": "user", "name": "x", "content": parts}]}
    )
    messages = [message.as_message() for message in request.messages]
    assert messages == [Message(role="system", content="rule"), Message(role="user", content="one two")]


def test_what_an_assistant_refused_with_is_what_it_said() -> None:
    parts = [{"type": "text", "text": "No: "}, {"type": "refusal", "refusal": "never"}]
    turns = [
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": parts},
    ]
    request = parse_chat_request(HELLO | {"messages": turns})
    assert [message.as_message().content for message in request.messages] == ["No.", "No: never"]


def test_an_answer_has_openais_shape(endless_model: Path) -> None:
    (answer,) = complete(endless_model, SHORT)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6


def test_without_a_limit_an_answer_fills_the_context_and_a_larger_limit_is_cut_to_it(endless_model: Path) -> None:
    long = [{"role": "user", "content": "0 1 2 3 " * 390}]
    body = SHORT | {"messages": long}
    answers = complete(endless_model, body | {"max_tokens": None}, body | {"max_completion_tokens": 5000})
    assert [answer["usage"]["total_tokens"] for answer in answers] == [2048, 2048]


def test_a_prompt_that_fills_the_context_is_refused(endless_model: Path) -> None:
    with pytest.raises(ApiError, match="2048 tokens") as caught:
        complete(endless_model, HELLO | {"messages": [{"role": "user", "content": "0 1 2 3 " * 2000}]})
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_several_answers_to_one_prompt_are_samples_of_their_own(endless_model: Path) -> None:
    body = HELLO | {"n": 3, "max_tokens": 10, "seed": 1}
    one, again = complete(endless_model, body, body)
    texts = [choice["message"]["content"] for choice in one["choices"]]
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert 10 < one["usage"]["completion_tokens"] <= 30


def test_the_default_temperature_samples(endless_model: Path) -> None:
    answers = complete(endless_model, *[HELLO | {"max_tokens": 12}] * 3)
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) > 1


def test_logprobs_name_each_token(endless_model: Path) -> None:
    (answer,) = complete(endless_model, SHORT | {"logprobs": True})
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 6
    assert all(entry["logprob"] < 0 and entry["top_logprobs"] == [] for entry in entries)
    assert all(bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"] for entry in entries)


def test_a_stop_string_is_not_part_of_the_answer(endless_model: Path) -> None:
    (free,) = complete(endless_model, SHORT | {"max_tokens": 30})
    text = free["choices"][0]["message"]["content"]
    (stopped,) = complete(endless_model, SHORT | {"max_tokens": 30, "stop": text[4:7]})
    assert stopped["choices"][0]["message"]["content"] == text[: text.index(text[4:7])]
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_a_stream_says_the_role_then_the_text_then_why_it_ended_then_the_usage(endless_model: Path) -> None:
    body = SHORT | {"max_tokens": 20}
    (whole,) = complete(endless_model, body)
    *chunks, last, usage = stream(endless_model, body | {"stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, last, usage]}) == 1


def test_a_stream_without_usage_does_not_mention_it(endless_model: Path) -> None:
    chunks = stream(endless_model, SHORT | {"n": 2, "logprobs": True})
    assert not any("usage" in chunk for chunk in chunks)
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(entries) == 12
    ends = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1]


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (InputError("x"), 400, {}),
        (NotFoundError("x"), 404, {}),
        (ConflictError("x"), 409, {"x-should-retry": "false"}),
        (BusyError("x"), 429, {"retry-after": "1"}),
        (CapacityError("x"), 503, {"retry-after": "1"}),
        (EngineError("x"), 503, {"retry-after": "1"}),
        (LuthierError("x"), 500, {}),
    ],
)
def test_every_expected_error_has_a_status(error: LuthierError, status: int, retry: dict[str, str]) -> None:
    api_error = as_api_error(error)
    assert (api_error.status, api_error.headers) == (status, retry)
    assert api_error.body["error"]["message"] == "x"
