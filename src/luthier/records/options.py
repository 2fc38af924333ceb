"""A record's fields as options: what a list on the screen and a page of the documentation say of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from luthier.records.record import Record, canonical_json

# How JSON Schema bounds a number, and how a person writes that.
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false"}


class Option(NamedTuple):
    """One option. ``name`` is dotted where it lies in a record of its own; ``values`` says what it may be."""

    name: str
    values: str
    default: str
    meaning: str


def options_of(kind: type[Record]) -> list[Option]:
    """Return every field of a record, those of nested records too, in their order."""
    schema = kind.model_json_schema()
    return list(_options(schema, schema.get("$defs", {}), ""))


def _options(schema: Mapping[str, Any], nested: Mapping[str, Any], prefix: str) -> Iterator[Option]:
    for name, field in schema["properties"].items():
        if "$ref" in field:
            yield from _options(nested[field["$ref"].rpartition("/")[2]], nested, f"{prefix}{name}.")
        else:
            default = field.get("default")
            shown = default if isinstance(default, str) else "" if default is None else canonical_json(default)
            yield Option(prefix + name, _values(field), shown, field.get("description", ""))


def _values(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " | ".join(_values(kind) for kind in field["anyOf"] if kind.get("type") != "null")
    if "enum" in field or "const" in field:
        return " | ".join(str(value) for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_values(field['items'])}"
    if field["type"] == "object":
        return f"{{name: {_values(field['additionalProperties'])}, …}}"
    bounds = ", ".join(f"{sign} {field[bound]}" for bound, sign in BOUNDS.items() if bound in field)
    return f"{TYPES[field['type']]} {bounds}".strip()
