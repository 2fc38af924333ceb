"""Answers that are JSON, fit a schema, or call functions: with a random model, which does nothing of it by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from luthier.errors import NotFoundError
from luthier.serve.pool import ModelPool, Resolved
from tests.api.conftest import Live
from tests.templates.tool_templates import HERMES, QWEN_CODER

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
SEEDS = range(4)


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    why: str = Field(max_length=8)
    score: float = Field(ge=0, le=1)


@pytest.fixture(scope="module")
def client(served_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a service with one model under three chat templates: "plain", "tools" and "unread"."""
    folders = {"plain": served_tiny_model}
    for name, template in (("tools", HERMES), ("unread", QWEN_CODER)):
        folders[name] = Path(shutil.copytree(served_tiny_model, tmp_path_factory.mktemp("served") / name))
        (folders[name] / "chat_template.jinja").write_text(template, "utf-8")

    def resolve(_: str, name: str) -> Resolved:
        if name not in folders:
            raise NotFoundError(f"The model {name!r} does not exist.")
        return Resolved(name, folders[name])

    live = Live(tmp_path_factory.mktemp("bound") / "home", ModelPool(resolve, lambda _: []))
    yield live.client()
    live.close()


def ended(client: openai.OpenAI, **options: Any) -> list[Any]:
    """Return the answers to several seeds that were not cut off."""
    create = client.chat.completions.create
    asked = {"messages": HELLO, "max_tokens": 400, "n": 4} | options
    choices = [choice for seed in SEEDS for choice in create(seed=seed * 10, **asked).choices]
    found = [choice for choice in choices if choice.finish_reason != "length"]
    assert found
    return found


# JSON


def test_json_mode_gives_objects(client: openai.OpenAI) -> None:
    for choice in ended(client, model="plain", response_format={"type": "json_object"}, n=8):
        assert isinstance(json.loads(choice.message.content), dict)


def test_the_sdk_parses_answers_into_a_programs_own_types(client: openai.OpenAI) -> None:
    parsed = []
    for seed in SEEDS:
        answer = client.chat.completions.parse(
            model="plain", messages=HELLO, response_format=Mood, max_tokens=400, seed=seed
        )
        parsed.append(answer.choices[0].message.parsed)
    assert all(isinstance(one, Mood) for one in parsed)


def test_a_streamed_answer_fits_its_schema_too(client: openai.OpenAI) -> None:
    for seed in SEEDS:
        with client.chat.completions.stream(
            model="plain", messages=HELLO, response_format=Mood, max_tokens=400, seed=seed, logprobs=True
        ) as stream:
            final = stream.get_final_completion()
        assert isinstance(final.choices[0].message.parsed, Mood)
        assert final.choices[0].logprobs is not None


def test_json_that_is_cut_off_says_so(client: openai.OpenAI) -> None:
    schema = {"name": "long", "schema": {"type": "string", "minLength": 100}}
    answer = client.chat.completions.create(
        model="plain", messages=HELLO, response_format={"type": "json_schema", "json_schema": schema}, max_tokens=9
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    assert answer.choices[0].message.content.startswith('"')


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"name": "x", "schema": {"type": "string", "not": {}}}, "response_format.json_schema.schema", "'not' cannot"),
        ({"name": "x", "schema": {"type": 5}}, "response_format.json_schema.schema", "5 is not one of"),
        ({"name": "x", "schema": [1]}, "response_format.json_schema.schema", "must be an object"),
        ({"schema": {}}, "response_format.json_schema.name", "Field required"),
        (None, "response_format.json_schema", "Field required"),
    ],
)
def test_a_schema_that_cannot_be_decoded_by_is_a_bad_request(
    client: openai.OpenAI, given: Any, param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.chat.completions.create(
            model="plain", messages=HELLO, response_format={"type": "json_schema", "json_schema": given}
        )
    assert caught.value.param == param


# Tools


def test_a_required_call_has_arguments_that_fit(client: openai.OpenAI) -> None:
    names = set()
    for choice in ended(client, model="tools", tools=TOOLS, tool_choice="required", parallel_tool_calls=False):
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", None, "function")
        names.add(call.function.name)
        arguments = json.loads(call.function.arguments)
        assert len(arguments["city"]) <= 4 if call.function.name == "weather" else arguments == {}
    assert names == {"weather", "time"}


def test_a_named_function_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    choices: list[Any] = [
        {"type": "function", "function": {"name": "time"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]},
        },
    ]
    for choice in choices:
        for answer in ended(client, model="tools", tools=TOOLS, tool_choice=choice):
            assert {call.function.name for call in answer.message.tool_calls} == {"time"}


def test_streamed_calls_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tools", "messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
    options |= {"max_tokens": 400, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    calls: list[list[str]] = []
    for chunk in chunks[:-1]:
        for part in chunk.choices[0].delta.tool_calls or ():
            if part.id:
                assert part.index == len(calls)
                calls.append([part.function.name, ""])
            calls[part.index][1] += part.function.arguments
    assert calls == [
        [call.function.name, call.function.arguments] for call in whole.choices[0].message.tool_calls or ()
    ]
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert not any(chunk.choices[0].delta.content for chunk in chunks[1:-1])


def test_what_a_function_said_is_part_of_the_prompt(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    asked = {"model": "tools", "max_tokens": 1, "tools": TOOLS}
    create = client.chat.completions.create
    with_result = create(messages=messages, **asked).usage.prompt_tokens
    assert create(messages=HELLO, **asked).usage.prompt_tokens < with_result
    assert create(messages=messages, model="tools", max_tokens=1).usage.prompt_tokens < with_result


def test_an_answer_may_be_bound_and_still_call(client: openai.OpenAI) -> None:
    schema = {"name": "word", "schema": {"enum": ["yes", "no"]}}
    options: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": schema}, "tools": TOOLS}
    for choice in ended(client, model="tools", **options):
        assert choice.message.tool_calls or json.loads(choice.message.content) in ("yes", "no")
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    answers = client.chat.completions.create(model="tools", messages=HELLO, tools=strict, max_tokens=30, n=4)
    assert len(answers.choices) == 4


def test_tools_that_are_not_to_be_called_are_not_shown(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 1}
    usual = create(model="plain", **asked).usage.prompt_tokens
    assert create(model="plain", tools=TOOLS, tool_choice="none", **asked).usage.prompt_tokens == usual


@pytest.mark.parametrize(
    ("model", "options", "param", "said"),
    [
        ("plain", {"tools": TOOLS}, "tools", "knows no tools"),
        ("unread", {"tools": TOOLS}, "tools", "how this model writes calls is not known"),
        ("tools", {"tool_choice": "required"}, "tool_choice", "no tools to choose from"),
        (
            "tools",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice",
            "'no' is not among the tools",
        ),
        (
            "tools",
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "tools[0].function.parameters",
            "'not' cannot be decoded by",
        ),
        (
            "tools",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
            "are an object",
        ),
    ],
)
def test_tools_that_cannot_be_used_are_a_bad_request(
    client: openai.OpenAI, model: str, options: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.chat.completions.create(model=model, messages=HELLO, **options)
    assert caught.value.param == param


def test_a_history_with_calls_needs_a_template_that_knows_them(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages: list[Any] = [*HELLO, {"role": "assistant", "tool_calls": [call]}, *HELLO]
    with pytest.raises(openai.BadRequestError, match="knows no tools") as caught:
        client.chat.completions.create(model="plain", messages=messages)
    assert caught.value.param == "messages"


# Other options


def test_the_options_that_the_engine_has_bind_the_answer(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    greedy = create(model="plain", messages=HELLO, max_tokens=8, temperature=0).choices[0].message.content
    for narrow in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 0}):
        extra = {name: value for name, value in narrow.items() if name != "top_p"}
        usual = {name: value for name, value in narrow.items() if name == "top_p"}
        answer = create(model="plain", messages=HELLO, max_tokens=8, extra_body=extra, **usual)
        assert answer.choices[0].message.content == greedy
    other = create(model="plain", messages=HELLO, max_tokens=8, temperature=0, extra_body={"repetition_penalty": 2.0})
    assert other.choices[0].message.content != greedy


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"logit_bias": {"5": 3}}, "logit_bias"),
        ({"logit_bias": {"999999": 3}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_what_the_engine_does_not_have_is_a_bad_request(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="plain", messages=HELLO, **options)
    assert caught.value.param == param


def test_a_tier_that_is_asked_for_is_told(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="plain", messages=HELLO, max_tokens=1, service_tier="flex")
    assert answer.service_tier == "default"
