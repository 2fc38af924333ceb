"""A random model that is bound to a schema writes what the schema accepts: nothing else can come of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammar_schemas import SCHEMAS

from luthier.llm.engine_process import EngineOptions
from luthier.llm.grammar.constraints import json_constraint
from luthier.llm.grammar.tool_calls import may_call, must_call
from luthier.llm.local import LocalModel
from luthier.llm.tool_reader import CallPiece, ToolReader
from luthier.records.completion import Completion, Constraint, Sampling
from luthier.records.example import Message
from luthier.templates.tool_formats import TOOL_FORMATS, ToolFormat

PROMPTS = [[Message(role="user", content=f"number {number}")] for number in range(12)]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}


@pytest.fixture(scope="module")
def model(served_tiny_model: Path) -> Iterator[LocalModel]:
    with LocalModel(served_tiny_model, "tiny", EngineOptions(precision="float32")) as model:
        yield model


def ask(model: LocalModel, constraint: Constraint, max_tokens: int = 300, **options: Any) -> list[Completion]:
    options = {"temperature": 1.0, "seed": 3} | options
    return model.answer(PROMPTS, Sampling(max_tokens=max_tokens, constraint=constraint, **options))


@pytest.mark.parametrize("schema", SCHEMAS, ids=map(str, range(len(SCHEMAS))))
def test_an_answer_that_ends_fits_its_schema(model: LocalModel, schema: Any) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    answers = ask(model, json_constraint(schema)) + ask(model, json_constraint(schema), seed=50)
    for answer in answers:
        if answer.finish_reason == "stop":
            validator.validate(json.loads(answer.text))
    assert any(answer.finish_reason == "stop" for answer in answers)


def test_an_answer_that_is_cut_off_says_so_and_had_begun_well(model: LocalModel) -> None:
    (answer, *_) = ask(model, json_constraint({"type": "string", "minLength": 50}), max_tokens=5)
    assert answer.finish_reason == "length"
    assert answer.text.startswith('"')


def test_greedy_answers_and_penalties_are_bound_too(model: LocalModel) -> None:
    constraint = json_constraint({"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 3, "maxItems": 3})
    for options in ({"temperature": 0.0}, {"frequency_penalty": 1.5, "top_k": 2, "min_p": 0.2}, {"logprobs": None}):
        sampling = Sampling(max_tokens=200, constraint=constraint, **{"temperature": 1.0, **options})
        assert all(len(json.loads(answer.text)) == 3 for answer in model.answer(PROMPTS, sampling))


def read(tool_format: ToolFormat, text: str) -> list[Any]:
    reader = ToolReader(tool_format, ["weather", "time"], several=True)
    calls: list[Any] = []
    for piece in [*reader.add(text), *reader.finish()]:
        if isinstance(piece, CallPiece) and piece.id:
            calls.append([piece.name, piece.arguments])
        elif isinstance(piece, CallPiece):
            calls[piece.number][1] += piece.arguments
        else:
            calls.append(piece)
    return calls


@pytest.mark.parametrize("tool_format", TOOL_FORMATS, ids=lambda one: one.name)
def test_an_answer_that_must_call_calls_with_arguments_that_fit(model: LocalModel, tool_format: ToolFormat) -> None:
    time = {"type": "object", "properties": {}, "additionalProperties": False}
    constraint = must_call(tool_format, [("weather", CITY), ("time", time)], several=False)
    answers = [answer for answer in ask(model, constraint) if answer.finish_reason == "stop"]
    assert answers
    for answer in answers:
        ((name, arguments),) = read(tool_format, answer.text)
        jsonschema.validate(json.loads(arguments), {"weather": CITY, "time": time}[name])


@pytest.mark.parametrize("tool_format", TOOL_FORMATS, ids=lambda one: one.name)
def test_an_answer_that_may_call_is_text_or_a_call_that_fits(model: LocalModel, tool_format: ToolFormat) -> None:
    constraint = may_call(tool_format, [("weather", CITY)], several=True)
    for answer in ask(model, constraint, max_tokens=40):
        for said in read(tool_format, answer.text):
            assert isinstance(said, str) or said[0] == "weather"
    bound = may_call(tool_format, [("weather", CITY)], several=True, schema={"const": "no"})
    texts = [answer.text for answer in ask(model, bound) if answer.finish_reason == "stop"]
    assert texts
    assert all(text == '"no"' or read(tool_format, text)[0][0] == "weather" for text in texts)
