"""What all records share: they are frozen, refuse unknown fields, and have one canonical JSON text."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.errors import InputError


class Record(BaseModel):
    """A frozen value object; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


R = TypeVar("R", bound=Record)


def validated(kind: type[R], what: str, **values: Any) -> R:
    """Return a record of a user's values.

    Raises:
        InputError: naming every value that breaks its rule.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise InputError(f"The {what} is not valid.", problems=problems) from error


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no white space, UTF-8 letters kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_hash(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON-able value's canonical text."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
