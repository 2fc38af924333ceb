"""Texts with ``{{item.…}}`` and ``{{sample.…}}``: handlebars, where what is named has to be there.

Handlebars writes nothing for a value that is not there, and ``[object Object]`` for an object. In a grader, the one
would compare with an empty text in silence, the other say nothing: so the first is an error, and the second is JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from luthier.errors import InputError, did_you_mean
from luthier.evaluate.graders.failure import GradingError
from luthier.templates.handlebars import HandlebarsText

NAMESPACES = ("item", "sample")
PLAIN_TAG = re.compile(r"\{\{\{?~?\s*((?:item|sample)(?:\.?\[[^\]{}]+\]|\.[^\s.{}\[\]~()]+)*)\s*~?\}?\}\}")
STEP = re.compile(r"\.?\[([^\]]+)\]|\.([^.\[\]]+)")
OF_SAMPLE = ("sample.output_json", "sample.output_tools", "sample.choices")  # not every answer has them
COMPILED_TEMPLATES = 512


def check_template(source: str, place: str, namespaces: Sequence[str] = NAMESPACES) -> None:
    """Refuse a text that is not valid, or names something else than what is there.

    Raises:
        InputError: that is the case.
    """
    unknown = sorted(_compiled(source, place).fields - set(namespaces))
    if unknown:
        there = " and ".join(f"{name}.…" for name in namespaces)
        hint = did_you_mean(unknown[0], namespaces)
        raise InputError(f"The {place} names {', '.join(unknown)}; only {there} can be named here.{hint}")


def item_fields(source: str) -> set[str]:
    """Return the fields of ``item`` that plain tags of a text name."""
    paths = (PLAIN_TAG.findall(source)) if "{{" in source else []
    steps = (_steps(path) for path in paths if path.startswith("item"))
    return {found[0] for found in steps if found}


def render(source: str, namespace: Mapping[str, Any]) -> str:
    """Return a text with its values; objects and lists are written as JSON.

    Raises:
        GradingError: a value that the text names is not there.
    """
    if "{{" not in source:
        return source
    has_blocks = "{{#" in source  # inside, a name may belong to something else than the whole

    def prepared(tag: re.Match[str]) -> str:
        try:
            value = look_up(tag[1], namespace)
        except LookupError:
            if has_blocks:
                return tag[0]
            raise _missing(tag[1]) from None
        return f"{{{{json {tag[1]}}}}}" if isinstance(value, dict | list) else tag[0]

    text = PLAIN_TAG.sub(prepared, source)
    try:
        return _compiled(text, "template").render(namespace)
    except InputError as error:
        raise GradingError("invalid_variable_error", str(error)) from error


def look_up(path: str, namespace: Mapping[str, Any]) -> Any:
    """Return the value at a path such as ``sample.output_tools[0].function.name``.

    Raises:
        LookupError: it is not there.
    """
    root = re.split(r"[.\[]", path, maxsplit=1)[0]
    value: Any = namespace[root]
    for step in _steps(path):
        if isinstance(value, list) and step.isdecimal():
            value = value[int(step)]
        elif isinstance(value, Mapping):
            value = value[step]
        else:
            raise LookupError(path)
    return value


def _steps(path: str) -> list[str]:
    root = re.split(r"[.\[]", path, maxsplit=1)[0]
    return [bracketed or plain for bracketed, plain in STEP.findall(path[len(root) :])]


def _missing(path: str) -> GradingError:
    if path.startswith(OF_SAMPLE):
        return GradingError("sample_parse_error", f"The answer has no {path}.")
    return GradingError("invalid_variable_error", f"There is no {path}.")


@lru_cache(COMPILED_TEMPLATES)
def _compiled(source: str, place: str) -> HandlebarsText:
    return HandlebarsText(source, place)
