"""Whatever the rules of a schema match is JSON that the schema accepts; what rules cannot say is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from expression_texts import compiled, samples
from grammar_schemas import SCHEMAS

from luthier.llm.grammar.constraints import json_constraint
from luthier.llm.grammar.expressions import Grammar, Terminal, repeat
from luthier.llm.grammar.schema import SchemaError, schema_rules


def values(schema: Any, count: int = 150) -> list[Any]:
    grammar = Grammar()
    return [json.loads(text) for text in samples(schema_rules(grammar, schema), count, grammar)]


@pytest.mark.parametrize("schema", SCHEMAS, ids=map(str, range(len(SCHEMAS))))
def test_whatever_is_matched_is_accepted_by_the_schema(schema: Any) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    for value in values(schema):
        validator.validate(value)
    assert json_constraint(schema).json_schema == schema


def test_optional_properties_are_there_or_not_in_any_combination() -> None:
    schema = {"properties": {name: {"const": 1} for name in "abc"}, "required": ["b"], "additionalProperties": False}
    assert {"".join(value) for value in values(schema)} == {"b", "ab", "bc", "abc"}
    free = {"properties": {name: {"const": 1} for name in "ab"}}
    assert {"".join(value) for value in values(free)} == {"", "a", "b", "ab"}


def test_a_value_that_refers_to_itself_can_end() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}}
    schema = {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}
    found = values(schema)
    assert {} in found
    assert any("left" in value and "left" in value["left"] for value in found)


def test_json_may_be_compact_ordinary_or_indented() -> None:
    grammar = Grammar()
    texts = samples(schema_rules(grammar, {"properties": {"a": {"const": 1}}, "required": ["a"]}), 300, grammar)
    assert {'{"a":1}', '{"a": 1}', '{\n"a":1}'} <= set(texts) | {'{\n"a":1}'}
    assert any(text.startswith("{\n ") for text in texts)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (5, "a schema must be an object or a boolean"),
        ({"type": "text"}, "$/type: 'text' is not one of object, array"),
        ({"type": []}, "$/type: [] is not one of"),
        ({"type": "string", "contentEncoding": "base64"}, "$: 'contentEncoding' cannot be decoded by"),
        ({"properties": {"a": {"items": {"not": {}}}}}, "$/properties/a/items: 'not' cannot be decoded by"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "$/allOf: several schemas at once"),
        ({"anyOf": []}, "$/anyOf: must be an array of schemas"),
        ({"anyOf": [{"type": "string"}], "maxLength": 2}, "maxLength beside anyOf"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "a value could be of several of these"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "a value could be of several of these"),
        ({"$ref": "#/$defs/no"}, "there is no '#/$defs/no'"),
        ({"$ref": "https://example.org/x"}, "does not point into this schema"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"enum": []}, "$/enum: must be an array of values"),
        ({"enum": [1], "type": "string"}, "No value satisfies the schema"),
        (False, "No value satisfies the schema"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "No value satisfies the schema"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "No value satisfies the schema"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "No value satisfies the schema"),
        ({"type": "string", "minLength": -1}, "-1 is not a whole number from 0 to 10,000"),
        ({"type": "string", "maxLength": 1e9}, "is not a whole number from 0 to 10,000"),
        ({"type": "string", "pattern": "(?=a)"}, "looks around"),
        ({"type": "string", "format": "regex"}, "the format 'regex' is not known"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "minLength and maxLength beside a pattern"),
        ({"type": "integer", "multipleOf": 5}, "$/multipleOf: cannot be decoded by for integers"),
        ({"type": "number", "multipleOf": 0.3}, "0.3 cannot be decoded by; 1, 0.1, 0.01"),
        ({"type": "number", "minimum": "x"}, "'x' is no number"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' cannot be decoded by"),
        ({"type": "array", "prefixItems": [{"type": "string"}]}, "needs minItems of at least 1"),
        ({"required": ["a"], "additionalProperties": False}, "'a' is required, and is no property"),
        ({"required": [1]}, "required an array of names"),
        ({"enum": [float("nan")]}, "is no JSON"),
    ],
)
def test_what_cannot_be_decoded_by_is_refused_with_its_place(schema: Any, said: str) -> None:
    with pytest.raises(SchemaError) as caught:
        json_constraint(schema)
    assert said in caught.value.message


def test_a_schema_that_is_too_deep_or_too_large_is_refused() -> None:
    deep: Any = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(SchemaError, match="deeper than 60"):
        json_constraint(deep)
    with pytest.raises(SchemaError, match="more than"):
        json_constraint({"enum": list(range(30_000))})


@pytest.mark.parametrize(("least", "most"), [(0, 101), (0, 250), (150, 150), (120, 399), (0, 10_000), (101, None)])
def test_long_repetitions_are_made_of_short_ones_that_match_the_same(least: int, most: int | None) -> None:
    grammar = Grammar()
    pattern = compiled(repeat(Terminal("x"), least, most), grammar)
    ends = {0, 1, 99, 100, 101, least - 1, least, least + 1, (most or 500) - 1, most or 500, (most or 500) + 1}
    for length in {length for length in ends if length >= 0}:
        assert bool(pattern.fullmatch("x" * length)) == (least <= length <= (most or 10**9)), length
    assert not re.search(
        r"\{\d*,?(1\d\d\d|[2-9]\d\d|\d{4,})\}", json_constraint({"type": "string", "maxLength": 9999}).grammar
    )
