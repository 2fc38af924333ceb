"""What is wrong with a request is said in words: the field, the rule and the value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from luthier.serve.chat_request import ChatRequest
from luthier.serve.field_errors import field_error
from luthier.serve.response_request import ResponseRequest

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


class Given(BaseModel):
    count: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    name: str | None = None


@pytest.mark.parametrize(
    ("kind", "body", "message", "param"),
    [
        (ChatRequest, CHAT | {"n": 1000}, "n: Input should be less than or equal to 128, not 1000", "n"),
        (ChatRequest, CHAT | {"temperature": "hot"}, "temperature: Input should be a valid number, ", "temperature"),
        (ChatRequest, CHAT | {"model": None}, "model: Input should be a valid string, not null", "model"),
        (ChatRequest, CHAT | {"stop": list("abcde")}, "stop: List should have at most 4 items ", "stop"),
        (ChatRequest, CHAT | {"stop": 5}, "stop: Input should be a valid string, not 5 or ", "stop"),
        (
            ChatRequest,
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            'messages[0].content[0].type: must be one of text, refusal, not "image_url"',
            "messages[0].content[0].type",
        ),
        (
            ResponseRequest,
            {"model": "tiny", "input": [{"type": "item_reference", "id": "x"}]},
            'input[0].type: must be one of message, function_call, function_call_output, not "item_reference"',
            "input[0].type",
        ),
        (
            ResponseRequest,
            {"model": "t", "input": [{"type": ""}]},
            "input[0].type: must be one of message, ",
            "input[0].type",
        ),
        (
            ResponseRequest,
            {"model": "t", "input": [{"type": "a b"}]},
            "input[0].type: must be one of ",
            "input[0].type",
        ),
        (
            ChatRequest,
            CHAT | {"logit_bias": {"5": 500, "6": -300}},
            "logit_bias.5: Input should be less than or ",
            "logit_bias.5",
        ),
        (
            ChatRequest,
            CHAT | {"metadata": {"a-b": 5, "c": 1}},
            "metadata.a-b: Input should be a valid string, not 5; ",
            "metadata.a-b",
        ),
        (ChatRequest, CHAT | {"temperature": "\ud800"}, "temperature: Input should be a valid string, ", "temperature"),
        (Given, {"count": 0}, "count: Input should be greater than or equal to 1, not 0", "count"),
        (Given, {"count": "many"}, "count: Input should be 'auto', not \"many\"", "count"),
        (Given, [], "The body: Input should be a valid dictionary", None),
    ],
)
def test_an_error_names_the_field_the_rule_and_the_value(
    kind: type[BaseModel], body: Any, message: str, param: str | None
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    error = field_error(caught.value.errors())
    assert error.message.startswith(message), error.message
    assert error.message.encode()
    assert error.param == param


def test_of_several_missing_fields_the_first_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({})
    error = field_error(caught.value.errors())
    assert (error.param, error.code) == ("model", "missing_required_parameter")
    assert error.message.startswith("model: Field required; messages: Field required")


def test_a_field_of_a_form_is_named_as_it_was_sent() -> None:
    found = {"loc": ("expires_after[seconds]",), "msg": "Input should be greater", "type": "greater", "input": 5}
    error = field_error([found])
    assert (error.param, error.message) == (
        "expires_after[seconds]",
        "expires_after[seconds]: Input should be greater, not 5",
    )
