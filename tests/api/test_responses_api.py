from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from luthier.llm.engine_process import EngineOptions
from luthier.records.response import StoredResponse
from luthier.serve import responses
from luthier.serve.pool import LoadedModel, ModelPool, Resolved, ServedModelInfo
from luthier.workflows.responses import LIFETIME_SECONDS, expire_responses
from tests.api.conftest import Live

NAME = "ft:tiny:acme:writer:abc123"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_output_tokens": 8}
LONG = 1900
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


CALLER = "ft:tiny:acme:caller:abc123"  # the same model with a chat template that knows tools
CALLING_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + ' <tool_call><|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def exact_pool(folder: Path) -> ModelPool:
    """A pool of a model and one that calls, whose answers do not depend on what else is in the batch."""
    folders = {NAME: folder, CALLER: folder.with_name("calling")}
    names = [ServedModelInfo(name, created=1) for name in folders]
    options = EngineOptions(precision="float32")
    return ModelPool(lambda _, name: Resolved(name, folders[name]), lambda _: names, options=options)


@pytest.fixture(scope="module")
def live(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    calling = shutil.copytree(endless_model, endless_model.with_name("calling"), dirs_exist_ok=True)
    (calling / "chat_template.jinja").write_text(CALLING_TEMPLATE)
    live = Live(tmp_path_factory.mktemp("responses") / "home", exact_pool(endless_model))
    yield live
    live.close()


def chat_text(live: Live, *turns: tuple[str, str]) -> str:
    messages: list[Any] = [{"role": role, "content": content} for role, content in turns]
    options: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 8, "messages": messages}
    return str(live.client().chat.completions.create(**options).choices[0].message.content)


def ask(live: Live, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/responses", json=GREEDY | {"input": "hello"} | body, timeout=60)


def test_the_openai_client_gets_the_text_that_a_chat_would_give(live: Live) -> None:
    response = live.client().responses.create(**GREEDY, input="hello", metadata={"a": "b"}, user="me")
    assert response.object == "response"
    assert response.output_text == chat_text(live, ("user", "hello"))
    assert response.output_text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert (response.metadata, response.model, response.user) == ({"a": "b"}, NAME, "me")
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    counted = live.client().responses.input_tokens.count(model=NAME, input="hello")
    assert counted.input_tokens == response.usage.input_tokens


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens"])
def test_others_are_answered_while_a_response_is_prepared(
    live: Live, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare: Callable[..., Any] = responses.prepare_response
    begun, answered = threading.Event(), threading.Event()

    def prepare_long(*given: Any) -> Any:
        begun.set()
        assert answered.wait(60)
        return prepare(*given)

    monkeypatch.setattr(responses, "prepare_response", prepare_long)
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(httpx.post, f"{live.url}{path}", json=GREEDY | {"input": "hello"}, timeout=60)
        try:
            assert begun.wait(60)
            assert httpx.get(f"{live.url}/health", timeout=30).status_code == 200
        finally:
            answered.set()
        assert asked.result().status_code == 200


def test_instructions_and_items_are_the_turns_of_a_chat(live: Live) -> None:
    items = [
        {"role": "developer", "content": "be short"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "yes", "annotations": []}],
        },
        {"role": "user", "content": "order"},
    ]
    response = live.client().responses.create(**GREEDY, instructions="be kind", input=items)  # type: ignore[call-overload]
    turns = [("system", "be kind"), ("system", "be short"), ("user", "hello"), ("assistant", "yes"), ("user", "order")]
    assert response.output_text == chat_text(live, *turns)
    assert response.instructions == "be kind"


def test_a_stream_has_openais_events_in_their_order(live: Live) -> None:
    whole = live.client().responses.create(**GREEDY, input="hello")
    events = list(live.client().responses.create(**GREEDY, input="hello", stream=True))
    types = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert types == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * len(deltas),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == events[-4].text == whole.output_text
    final = events[-1].response
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    assert {event.item_id for event in deltas} == {final.output[0].id}
    assert live.client().responses.retrieve(final.id).output_text == whole.output_text


def test_the_clients_own_stream_helper_puts_the_response_together(live: Live) -> None:
    whole = live.client().responses.create(**GREEDY, input="hello")
    with live.client().responses.stream(**GREEDY, input="hello") as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_each_event_is_named(live: Live) -> None:
    text = ask(live, stream=True).text
    blocks = [block.split("\n") for block in text.removesuffix("\n\n").split("\n\n")]
    for name, data in blocks:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_logprobs_are_told_where_they_are_included(live: Live) -> None:
    options = {"input": "hello", "include": ["message.output_text.logprobs"]}
    part = live.client().responses.create(**GREEDY | options).output[0].content[0]
    assert len(part.logprobs) == 8
    assert all(entry.logprob < 0 for entry in part.logprobs)
    events = list(live.client().responses.create(**GREEDY | options, stream=True))
    told = [entry.token for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert told == [entry.token for entry in part.logprobs]


def test_a_conversation_goes_on_from_a_response_also_after_a_restart(live: Live, endless_model: Path) -> None:
    first = live.client().responses.create(**GREEDY, input="hello", instructions="be kind")
    second = live.client().responses.create(**GREEDY, input="order", previous_response_id=first.id)
    turns = [("user", "hello"), ("assistant", first.output_text), ("user", "order")]
    assert second.output_text == chat_text(live, *turns)  # without the first one's instructions
    restarted = Live(live.store.home, exact_pool(endless_model))
    try:
        client = restarted.client()
        third = client.responses.create(**GREEDY, input="thank you", previous_response_id=second.id)
        assert third.previous_response_id == second.id
        turns += [("assistant", second.output_text), ("user", "thank you")]
        assert third.output_text == chat_text(live, *turns)
        items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    finally:
        restarted.close()
    assert [(item.role, item.content[0].text) for item in items] == turns
    newest = live.client().responses.input_items.list(third.id, limit=1)
    assert newest.data[0].content[0].text == "thank you"
    assert newest.has_more


def test_a_kept_response_can_be_read_and_deleted_and_others_go_on_without_it(live: Live) -> None:
    client = live.client()
    first = client.responses.create(**GREEDY, input="hello")
    second = client.responses.create(**GREEDY, input="order", previous_response_id=first.id)
    assert client.responses.retrieve(first.id) == first
    client.responses.delete(first.id)
    for gone in (lambda: client.responses.retrieve(first.id), lambda: client.responses.delete(first.id)):
        with pytest.raises(openai.NotFoundError):
            gone()
    assert len(list(client.responses.input_items.list(second.id))) == 3
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**GREEDY, input="order", previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.BadRequestError, match="is finished"):
        client.responses.cancel(second.id)


def test_what_is_not_to_be_stored_is_not(live: Live) -> None:
    client = live.client()
    whole = client.responses.create(**GREEDY, input="hello", store=False)
    *_, last = client.responses.create(**GREEDY, input="hello", store=False, stream=True)
    for id in (whole.id, last.response.id):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(id)


def test_a_response_expires_after_thirty_days(live: Live) -> None:
    client = live.client()
    kept = client.responses.create(**GREEDY, input="hello")
    old = client.responses.create(**GREEDY, input="hello")

    def age(stored: StoredResponse) -> StoredResponse:
        return stored.model_copy(update={"expires_at": stored.expires_at - LIFETIME_SECONDS})

    live.store.responses.change("default", old.id, age)
    with pytest.raises(openai.NotFoundError, match="expired"):
        client.responses.retrieve(old.id)
    expire_responses(live.store)
    assert old.id not in {stored.id for stored in live.store.responses.all("default")}
    assert client.responses.retrieve(kept.id).id == kept.id


@pytest.mark.parametrize(
    ("option", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools[0].name"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"stop": ["a"]}, "stop"),
        ({"messages": []}, None),
        ({"messages": [{"role": "user", "content": "hello"}]}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "robot", "content": "hello"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": "0 1 2 3 " * 2000}, "input"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ],
)
def test_what_cannot_be_honoured_is_a_bad_request_that_names_it(
    live: Live, option: dict[str, Any], param: str | None
) -> None:
    response = ask(live, **option)
    assert response.status_code == (200 if param is None else 400), response.text
    if param is not None:
        assert response.json()["error"]["param"] == param


def test_options_that_change_nothing_are_tolerated(live: Live) -> None:
    harmless = {
        "background": False,
        "truncation": "disabled",
        "reasoning": {"effort": None},
        "text": {"format": {"type": "text"}},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "include": [],
        "stream_options": {"include_obfuscation": True},
        "service_tier": "auto",
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "never_heard_of": 1,
    }
    assert ask(live, **harmless).json()["output"][0]["content"] == ask(live).json()["output"][0]["content"]


CALLING: dict[str, Any] = {"model": CALLER, "tools": [TOOL], "tool_choice": "required", "temperature": 0}


def test_a_model_calls_a_function_and_goes_on_with_what_it_gave(live: Live) -> None:
    client = live.client()
    first = client.responses.create(**CALLING, input="weather?", parallel_tool_calls=False)
    (call,) = first.output
    assert (call.type, call.name, call.status, first.status) == ("function_call", "weather", "completed", "completed")
    assert set(json.loads(call.arguments)) == {"city"}
    assert (first.tools[0].name, first.tool_choice) == ("weather", "required")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    told: dict[str, Any] = {"model": CALLER, "tools": [TOOL], "tool_choice": "none", "temperature": 0}
    second = client.responses.create(**told, max_output_tokens=8, input=[output], previous_response_id=first.id)
    items = [{"role": "user", "content": "weather?"}, call.model_dump(exclude_none=True), output]
    assert client.responses.create(**told, max_output_tokens=8, input=items).output_text == second.output_text
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]


def test_a_streamed_call_has_openais_events_in_their_order(live: Live) -> None:
    whole = live.client().responses.create(**CALLING, input="weather?", parallel_tool_calls=False)
    events = list(live.client().responses.create(**CALLING, input="weather?", parallel_tool_calls=False, stream=True))
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert [event.type for event in events] == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        *["response.function_call_arguments.delta"] * len(deltas),
        *("response.function_call_arguments.done", "response.output_item.done", "response.completed"),
    ]
    call = whole.output[0]
    assert "".join(event.delta for event in deltas) == events[-3].arguments == call.arguments
    assert events[2].item.name == events[-2].item.name == call.name
    assert {event.item_id for event in deltas} == {events[-2].item.id}


def test_an_answer_is_bound_to_a_schema(live: Live) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    text: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    response = live.client().responses.create(**GREEDY | {"max_output_tokens": 60}, input="hello", text=text)
    assert response.status == "completed"
    assert set(json.loads(response.output_text)) == {"a"}
    assert response.text.format.schema_ == schema
    schema["properties"] = {"a": {"$ref": "https://example.com/schema"}}
    with pytest.raises(openai.BadRequestError) as caught:
        live.client().responses.create(**GREEDY, input="hello", text=text)
    assert caught.value.param == "text.format.schema"


def writer(live: Live) -> LoadedModel:
    """Return the model that knows no tools."""
    return next(model for model in live.service.pool.loaded if model.chat_format.tool_template is None)


def assert_engine_is_free(live: Live) -> None:
    """See that a full-length answer is the only one that the engine works on."""
    loaded = writer(live)
    live.client().responses.create(**GREEDY | {"max_output_tokens": LONG}, input="hello")
    assert loaded.engine.in_flight == 0


def test_a_client_that_leaves_frees_the_engine_and_nothing_is_kept(live: Live) -> None:
    before = len(list(live.store.responses.all("default")))
    body = GREEDY | {"max_output_tokens": LONG, "input": "hello"}
    stream = live.client().responses.create(**body, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/responses", json=body, timeout=httpx.Timeout(10, read=0.2))
    assert_engine_is_free(live)
    assert len(list(live.store.responses.all("default"))) == before + 1


def test_a_killed_engine_ends_the_stream_with_a_failure(live: Live) -> None:
    stream = live.client().responses.create(**GREEDY | {"max_output_tokens": LONG}, input="hello", stream=True)
    events = iter(stream)
    first = next(events)
    next(events)
    loaded = writer(live)
    os.kill(loaded.engine.pid, signal.SIGKILL)
    *_, last = events
    assert last.type == "response.failed"
    assert last.response.error.code == "server_error"
    assert "died" in last.response.error.message
    with pytest.raises(openai.NotFoundError):
        live.client().responses.retrieve(first.response.id)
