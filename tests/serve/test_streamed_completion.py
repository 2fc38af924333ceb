from __future__ import annotations

from typing import Any

from luthier.serve.streamed_completion import StreamedCompletion

ENVELOPE = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m", "usage": None}


def put_together(*parts: dict[str, Any]) -> dict[str, Any]:
    streamed = StreamedCompletion()
    for part in parts:
        streamed.add(ENVELOPE | part)
    return streamed.completion


def delta(value: dict[str, Any], index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": value, "logprobs": None, "finish_reason": None} | more]}


def test_text_logprobs_and_usage_are_put_together_per_choice() -> None:
    entry = {"token": "Hel", "logprob": -1.0, "bytes": None, "top_logprobs": []}
    completion = put_together(
        delta({"role": "assistant", "content": "", "refusal": None}),
        delta({"role": "assistant", "content": "", "refusal": None}, 1),
        delta({"content": "Hel"}, logprobs={"content": [entry], "refusal": None}),
        delta({"content": "Bye"}, 1),
        delta({"content": "lo"}, logprobs={"content": [entry], "refusal": None}),
        delta({}, finish_reason="stop"),
        delta({}, 1, finish_reason="length"),
        {"choices": [], "usage": {"total_tokens": 5}},
    )
    assert (completion["object"], completion["id"], completion["usage"]) == (
        "chat.completion",
        "chatcmpl-1",
        {"total_tokens": 5},
    )
    first, second = completion["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("Hello", "stop")
    assert (second["message"]["content"], second["finish_reason"], second["index"]) == ("Bye", "length", 1)
    assert len(first["logprobs"]["content"]) == 2
    assert second["logprobs"] is None


def test_tool_calls_are_put_together_by_their_index() -> None:
    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, "function": {"arguments": arguments} | more.pop("f", {})} | more]}

    completion = put_together(
        delta({"role": "assistant", "content": ""}),
        delta(call(0, "", id="call_1", type="function", f={"name": "weather"})),
        delta(call(0, '{"city":')),
        delta(call(1, "{}", id="call_2", type="function", f={"name": "time"})),
        delta(call(0, '"Rome"}')),
        delta({}, finish_reason="tool_calls"),
    )
    message = completion["choices"][0]["message"]
    assert message["content"] is None
    assert [(one["id"], one["function"]["name"], one["function"]["arguments"]) for one in message["tool_calls"]] == [
        ("call_1", "weather", '{"city":"Rome"}'),
        ("call_2", "time", "{}"),
    ]
