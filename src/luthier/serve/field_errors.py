"""What pydantic finds wrong with a request, in words that name the field, the rule and the value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.serve.api_error import ApiError

Place = tuple[int | str, ...]

MAX_FINDINGS = 8
MAX_VALUE_LETTERS = 60
SAY_THE_VALUE_THEMSELVES = frozenset({"missing", "extra_forbidden", "value_error", "assertion_error"})
FORM_FIELD = re.compile(r"(?!list|dict|tuple|set)[a-z_]+\[[a-z_]+\]")  # such as expires_after[seconds]
# What pydantic calls the members of a union that it tried: their types, or our tags, which have a blank in them.
MEMBER = re.compile(r"str|int|float|bool|none|[A-Z].*|.*\[.*|.* .*|(constrained|nullable|function|union)-.*", re.DOTALL)
EXPECTED_TAG = re.compile(r"'(?:\w+ )?(\w+)'")


def field_error(found: Sequence[Mapping[str, Any]], within: Place = ()) -> ApiError:
    """Return pydantic's findings (``ValidationError.errors()``) as one error.

    ``param`` is the path of the innermost field, as in ``messages[0].role``. Of the members of a union, those count
    whose type is that of the value.

    Args:
        found: Of each finding its ``loc``, ``msg`` and ``type``; its ``input`` and ``ctx`` where there are some.
        within: Where in the request the object stands that was looked at.
    """
    findings = _of_the_right_type([_Finding.of(one, within) for one in found])
    innermost = max(findings, key=lambda finding: finding.depth)
    words: dict[str, list[str]] = {}
    for finding in findings:
        words.setdefault(finding.path, []).append(finding.words)
    return ApiError(
        400,
        "; ".join(_sentence(path, said) for path, said in list(words.items())[:MAX_FINDINGS]),
        param=innermost.path or None,
        code="missing_required_parameter" if innermost.kind == "missing" else "invalid_value",
    )


@dataclass(frozen=True)
class _Finding:
    path: str
    kind: str
    words: str
    is_of_another_type: bool

    @classmethod
    def of(cls, one: Mapping[str, Any], within: Place) -> _Finding:
        kind, path = one["type"], _path((*within, *one["loc"]))
        if kind == "union_tag_invalid":
            known = ", ".join(dict.fromkeys(EXPECTED_TAG.findall(one["ctx"]["expected_tags"])))
            given = one["input"].get("type") if isinstance(one["input"], dict) else None
            return cls(f"{path}.type".removeprefix("."), kind, f"must be one of {known}, not {_shown(given)}", False)
        is_other = kind.endswith("_type") or (kind == "literal_error" and not isinstance(one.get("input"), str))
        return cls(path, kind, one["msg"] + _value(one), is_other)

    @property
    def depth(self) -> int:
        return self.path.count(".") + self.path.count("[")


def _of_the_right_type(findings: list[_Finding]) -> list[_Finding]:
    """Leave out what is wrong with a value as one of another type, where something else is wrong with it or in it."""

    def is_told_better(finding: _Finding) -> bool:
        inside = (f"{finding.path}.", f"{finding.path}[")
        return any(
            other.path.startswith(inside) or (other.path == finding.path and not other.is_of_another_type)
            for other in findings
        )

    return [finding for finding in findings if not (finding.is_of_another_type and is_told_better(finding))]


def _sentence(path: str, said: list[str]) -> str:
    first, *others = dict.fromkeys(said)
    return f"{path or 'The body'}: " + " or ".join([first, *(_lowered(other) for other in others)])


def _lowered(words: str) -> str:
    return words.removeprefix("Input should be ")


def _value(one: Mapping[str, Any]) -> str:
    """Return ``, not 0``: the value that was found, where it is a short one and the message does not say it."""
    value = one.get("input", ...)
    if one["type"] in SAY_THE_VALUE_THEMSELVES or not isinstance(value, str | int | float | None):
        return ""
    return f", not {_shown(value)}"


def _shown(value: Any) -> str:
    """Return a value as JSON, cut where it is long, in letters that can be sent."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_VALUE_LETTERS else f"{text[:MAX_VALUE_LETTERS]}…"


def _path(place: Place) -> str:
    """Return pydantic's place of a finding without the members of unions that it tried (``str``, ``list[…]``)."""
    parts = [part for part in place if isinstance(part, int) or _is_field(part)]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _is_field(part: str) -> bool:
    return FORM_FIELD.fullmatch(part) is not None or MEMBER.fullmatch(part) is None
