"""Patterns and formats become rules for the content of JSON strings."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time, timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID

import pytest
from expression_texts import compiled, samples
from pydantic import TypeAdapter

from luthier.llm.grammar.expressions import concat
from luthier.llm.grammar.patterns import FORMATS, PatternError, read_format, read_pattern

PATTERNS = [
    "^[a-z]+$",
    "^a|b$",
    "colou?r",
    r"^\d{3}-\d{4}$",
    r'^"[^"\\]*"$',
    r"^(?:x|yy){2,3}$",
    r"^[^\W_]+$",
    r"^\s*\S+\t?$",
    r"^[\w.-]+@[\w-]+$",
    r"^(?<year>[12]\d{3})\/é\u00e9\x41$",
    "^.*$",
    "^[+-]?[0-9]+$",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_matched_is_json_of_a_text_that_the_pattern_accepts(pattern: str) -> None:
    found = read_pattern(pattern)
    for text in samples(concat('"', found.expression, '"'), 200):
        value = json.loads(text)
        assert re.search(pattern.replace("(?<", "(?P<"), value), text
        assert found.least <= len(value)
        assert found.most is None or len(value) <= found.most


@pytest.mark.parametrize(
    ("pattern", "text"), [("^[a-z]+$", "abc"), ("b", "abc"), ('^"$', '"'), (r"^\\$", "\\"), (r"^\n$", "\n")]
)
def test_a_text_that_the_pattern_accepts_is_matched_as_json_writes_it(pattern: str, text: str) -> None:
    assert compiled(concat('"', read_pattern(pattern).expression, '"')).fullmatch(json.dumps(text))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(?=a)b", "looks around"),
        (r"(a)\1", r"has \1"),
        (r"\bword\b", r"has \b"),
        (r"\p{L}", r"has \p"),
        ("a^b", "has a ^ in its middle"),
        ("a$b", "has a $ that is not at its end"),
        ("(a$)", "has a $ in its middle"),
        ("*a", "nothing to repeat"),
        ("a**", "repeats a repetition"),
        ("(a", "not closed"),
        ("a)", "nothing opened"),
        ("[a", "ends in its middle"),
        ("[b-a]", "range that is none"),
        ("a{2,1}", "repeats 2 to 1 times"),
        ("a{99999}", "10000 is the most"),
        ("a{x}", "no number of repetitions"),
        ("a\\", "ends in its middle"),
        ("(" * 40 + ")" * 40, "deeper than 30"),
    ],
)
def test_what_cannot_be_a_rule_is_refused_with_its_reason(pattern: str, said: str) -> None:
    with pytest.raises(PatternError, match=re.escape(said)):
        read_pattern(pattern)


KINDS: dict[str, Any] = {
    "date": date,
    "time": time,
    "date-time": datetime,
    "ipv4": IPv4Address,
    "ipv6": IPv6Address,
    "uuid": UUID,
    "duration": timedelta,
}
SHAPES = {
    "email": r"[^@\s]+@[^@\s]+\.[a-z]+",
    "hostname": r"[a-z0-9.-]+",
    "uri": r"https?://[^\s]+",
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_matched_is_of_its_format(name: str) -> None:
    for text in samples(concat('"', read_format(name).expression, '"'), 200):
        value = json.loads(text)
        if name in KINDS:
            TypeAdapter(KINDS[name]).validate_python(value)
        else:
            assert re.fullmatch(SHAPES[name], value), value


def test_an_unknown_format_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(PatternError, match="known are date"):
        read_format("color")
