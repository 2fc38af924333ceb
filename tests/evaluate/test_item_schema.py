from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import InputError
from luthier.evaluate.item_schema import ItemSchema

QUESTION = {"type": "object", "properties": {"q": {"type": "string", "pattern": "^[a-z]+$"}}, "required": ["q"]}


def test_an_item_that_does_not_fit_says_where() -> None:
    schema = ItemSchema(QUESTION)
    assert schema.problems({"q": "hello", "more": 1}) == []
    assert schema.problems({}) == ["item: 'q' is a required property"]
    assert schema.problems({"q": "Hello"}) == ["item.q: 'Hello' does not match '^[a-z]+$'"]
    nested = ItemSchema({"properties": {"rows": {"items": QUESTION}}})
    assert nested.problems({"rows": [{"q": "a"}, {"q": 1}]}) == ["item.rows[1].q: 1 is not of type 'string'"]


def test_fields_that_no_item_can_have_are_known() -> None:
    assert ItemSchema(QUESTION).lacks({"q", "x"}) == []
    assert ItemSchema(QUESTION | {"additionalProperties": False}).lacks({"q", "x"}) == ["x"]


def test_a_pattern_takes_no_time_that_grows_with_more_than_the_text() -> None:
    schema = ItemSchema({"properties": {"q": {"pattern": "^(a+)+$"}}})
    assert schema.problems({"q": "a" * 100_000 + "b"})
    assert not schema.problems({"q": "a" * 100_000})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "thing"}, "not a JSON schema"),
        ({"pattern": "("}, "not a JSON schema"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"properties": {"q": {"patternProperties": {"(a+)+$": True}}}}, "patternProperties is not supported"),
        ({"$schema": ["x"]}, r"\$schema must be a text"),
        ({"properties": 3}, "not a JSON schema"),
    ],
)
def test_what_is_no_schema_is_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ItemSchema(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "which is not in it"),
        ({"$ref": "file:///etc/passwd"}, "which is not in it"),
        ({"$ref": "#/$defs/none"}, "which is not in it"),
        ({"$ref": "#"}, "without end"),
    ],
)
def test_a_reference_leads_nowhere_but_into_the_schema(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ItemSchema(schema).problems({"q": "a"})
    within = ItemSchema({"properties": {"q": {"$ref": "#/$defs/text"}}, "$defs": {"text": {"type": "string"}}})
    assert within.problems({"q": 1}) == ["item.q: 1 is not of type 'string'"]
