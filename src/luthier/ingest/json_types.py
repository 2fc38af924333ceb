"""What JSON calls a value, for messages about wrong rows."""

from __future__ import annotations

from typing import Any


def json_type(value: Any) -> str:
    """Return what JSON calls a value, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")
