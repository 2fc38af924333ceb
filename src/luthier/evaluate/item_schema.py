"""Check items against a JSON schema that a user wrote, without harm: no network, no pattern that never ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any

import jsonschema
import referencing
from jsonschema.validators import Draft202012Validator, extend, validator_for
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import SchemaError

from luthier.errors import InputError

MAX_PROBLEMS = 5
# What the package raises by accident where a schema or a number is odd.
SURPRISES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ItemSchema:
    """A schema that items have to fit.

    ``pattern`` is matched by Rust's engine, whose time grows with the text alone; it knows no look-around and no
    back-references. ``patternProperties`` is refused, since Python's engine would match it. ``$ref`` stays within the
    schema.

    Args:
        schema: JSON schema, of the draft that ``$schema`` names or of 2020-12.

    Raises:
        InputError: it is no JSON schema, or uses what is not supported.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        if not isinstance(schema.get("$schema", ""), str):
            raise InputError("not a JSON schema: $schema must be a text")
        try:
            kind = validator_for(schema, default=Draft202012Validator)
            kind.check_schema(schema)
            for pattern in _patterns(schema):
                _matcher(pattern)
        except (jsonschema.SchemaError, SchemaError, PydanticSchemaGenerationError, *SURPRISES) as error:
            message = " ".join(str(getattr(error, "message", error)).split())
            raise InputError(f"not a JSON schema: {message[:200]}") from error
        except RecursionError as error:
            raise InputError("nested too deeply") from error
        bounded = extend(kind, {"pattern": _pattern})
        self._validator = bounded(schema, registry=referencing.Registry())
        properties = schema.get("properties")
        self._closed = schema.get("additionalProperties") is False and isinstance(properties, dict)
        self._fields = frozenset(properties or {}) if isinstance(properties, dict) else frozenset()

    def problems(self, item: Any) -> list[str]:
        """Return what is wrong with an item; nothing where it fits.

        Raises:
            InputError: the schema refers to something that is not in it, or to itself without end.
        """
        found = []
        try:
            for error in self._validator.iter_errors(item):
                place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
                found.append(f"item{place}: {error.message[:200]}")
                if len(found) == MAX_PROBLEMS:
                    break
        except referencing.exceptions.Unresolvable as error:
            raise InputError(f"item_schema refers to {error.ref!r}, which is not in it.") from error
        except RecursionError as error:
            raise InputError("item_schema refers to itself without end, or the item is nested too deeply.") from error
        except SURPRISES as error:
            raise InputError(f"item_schema cannot be checked on this item: {error}") from error
        return found

    def lacks(self, fields: set[str]) -> list[str]:
        """Return those of some fields of ``item`` that no item can have."""
        return sorted(fields - self._fields) if self._closed else []


def _patterns(schema: Any) -> Iterator[str]:
    """Yield all patterns of a schema, and perhaps some texts that only look like ones.

    Raises:
        InputError: the schema has names of properties that are patterns.
    """
    if isinstance(schema, list):
        for part in schema:
            yield from _patterns(part)
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        if isinstance(schema.get("patternProperties"), dict):
            raise InputError("patternProperties is not supported here")
        yield from _patterns(list(schema.values()))


@lru_cache(256)
def _matcher(pattern: str) -> TypeAdapter[str]:
    return TypeAdapter(Annotated[str, Field(pattern=pattern)])


def _matches(pattern: str, text: str) -> bool:
    try:
        _matcher(pattern).validate_python(text)
    except ValidationError:
        return False
    return True


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield jsonschema.ValidationError(f"{instance[:100]!r} does not match {pattern!r}")
