"""Schemas as people write them, and with what schemas have in their corners."""

from __future__ import annotations

from datetime import date
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Colour(Enum):
    red = "red"
    green = 'gr"een'


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool = True


class Person(BaseModel):
    """As a program would describe what it wants."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    age: int | None = Field(ge=0, lt=130)
    born: date
    colour: Colour
    pet: Cat | Dog = Field(discriminator="kind")
    scores: list[float] = Field(min_length=1, max_length=3)
    friends: list[Person] = Field(max_length=1)


SHORT = {"type": "string", "maxLength": 3}
SCHEMAS: list[Any] = [
    Person.model_json_schema(),
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": SHORT}, "required": ["a", "b"]},
    {"type": "object", "properties": {"a": SHORT, "b": SHORT}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"type": "object", "required": ["x"], "additionalProperties": {"enum": [1, 2]}},
    {"type": "object", "properties": {"never": False, "a": True}},
    {"type": "object"},
    {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "maxItems": 0},
    {"type": "array", "items": False},
    {"type": "array", "prefixItems": [SHORT, {"type": "integer"}], "minItems": 2, "items": False},
    {"type": "array", "prefixItems": [SHORT, SHORT], "minItems": 3, "items": {"const": None}},
    {"type": ["string", "null"], "minLength": 2, "maxLength": 4},
    {"type": ["integer", "number"], "minimum": 0.5, "exclusiveMaximum": 2},
    {"type": "integer", "exclusiveMinimum": -3, "maximum": 10},
    {"type": "number", "multipleOf": 1, "minimum": 0, "maximum": 3},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    {"type": "string", "pattern": "^a+$", "minLength": 1},
    {"type": "string", "format": "uuid"},
    {"type": "string", "pattern": "^[^\\x00-\\x7f]{20}$"},
    {"type": "string", "pattern": "^[\u0912-\uac34\U0001f300-\U0010fabc]{12}$"},
    {"type": "string", "minLength": 30, "maxLength": 40},
    {"enum": ["yes", "no", 1, 2.5, None, True, {"a": [1]}, 'quo"te', "new\nline", "\u2028", "🎻"]},
    {"type": "string", "enum": ["a", 1]},
    {"const": {"deep": ["x"]}},
    {"anyOf": [SHORT, {"type": "integer", "minimum": 1, "maximum": 3}], "description": "either"},
    {"type": "object", "anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"maxProperties": 0}][:1]},
    {"oneOf": [SHORT, {"type": "boolean"}, {"enum": [1, 2]}]},
    {"allOf": [{"$ref": "#/definitions/it"}], "definitions": {"it": {"type": "boolean"}}},
    {"$defs": {"a/b": {"const": 1}}, "properties": {"x": {"$ref": "#/$defs/a~1b"}}, "required": ["x"]},
    {"minimum": 3, "title": "a number, since it has a minimum", "type": "number", "maximum": 4.25},
    {"title": "anything", "x-extension": 1},
    True,
]
