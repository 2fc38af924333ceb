"""An answer's text is read as what it says and what it calls, however it comes in pieces."""

from __future__ import annotations

import re
from typing import Any

import pytest

from luthier.llm.tool_reader import CallPiece, ToolReader
from luthier.templates.tool_formats import TOOL_FORMATS

FORMATS = {one.name: one for one in TOOL_FORMATS}
NAMES = ("weather", "time")


def read(name: str, *texts: str, several: bool = True) -> list[Any]:
    """Return texts, and calls as (name, arguments), of an answer that comes in these pieces."""
    reader = ToolReader(FORMATS[name], NAMES, several=several)
    pieces = [piece for text in texts for piece in reader.add(text)] + reader.finish()
    found: list[Any] = []
    calls: list[list[str]] = []
    for piece in pieces:
        if not isinstance(piece, CallPiece):
            found = [*found[:-1], found[-1] + piece] if found and isinstance(found[-1], str) else [*found, piece]
        elif piece.id is not None:
            assert piece.number == len(calls)
            calls.append([str(piece.name), piece.arguments])
            found.append(calls[-1])
        else:
            calls[piece.number][1] += piece.arguments
    assert reader.calls == len(calls)
    return [tuple(one) if isinstance(one, list) else one for one in found]


WEATHER = '{"name": "weather", "arguments": {"city": "Bonn", "tags": ["}", "\\""]}}'
ARGUMENTS = '{"city": "Bonn", "tags": ["}", "\\""]}'
ANSWERS = [
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", [("weather", ARGUMENTS)]),
    ("hermes", f"Let me look.\n<tool_call>\n{WEATHER}\n</tool_call>", ["Let me look.", ("weather", ARGUMENTS)]),
    (
        "hermes",
        f'<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{{"name":"time","arguments":{{}}}}</tool_call>\n',
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', [("time", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>', [("time", '{"a": 1}')]),
    ("hermes", "no call: 1 < 2, <tool", ["no call: 1 < 2, <tool"]),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None),
    ("hermes", "<tool_call>nonsense</tool_call> and more", None),
    ("hermes", '<tool_call>{"name": "time", "arguments": 3}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "time', None),
    ("hermes", "text \n", None),
    ("mistral", f"[TOOL_CALLS][{WEATHER}]", [("weather", ARGUMENTS)]),
    (
        "mistral",
        f'[TOOL_CALLS] [{WEATHER}, {{"name": "time", "arguments": {{}}, "id": "abc"}}]',
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    ("mistral", "[TOOL_CALLS] nonsense", None),
    ("llama3", '{"name": "time", "parameters": {"zone": "CET"}}', [("time", '{"zone": "CET"}')]),
    ("llama3", '<|python_tag|>{"name": "time", "parameters": {}}', [("time", "{}")]),
    ("llama3", 'Say {"name": "time", "parameters": {}}', None),
    ("llama3", '{"name": "nobody", "parameters": {}}', None),
    ("llama3", "  hello", None),
    ("llama3", "", []),
]


@pytest.mark.parametrize(("name", "answer", "expected"), ANSWERS)
def test_calls_and_text_are_told_apart_and_nothing_is_lost(name: str, answer: str, expected: list[Any] | None) -> None:
    expected = [answer] if expected is None else expected
    assert read(name, answer) == expected
    assert read(name, *answer) == expected
    assert read(name, *re.findall(r".{1,3}", answer, re.DOTALL)) == expected


def test_arguments_are_told_while_they_come() -> None:
    reader = ToolReader(FORMATS["hermes"], NAMES, several=True)
    assert reader.add('<tool_call>\n{"name": "weather", "argu') == []
    (first, second) = reader.add('ments": {"city": "Bo')
    assert isinstance(first, CallPiece)
    assert (first.number, first.name, first.arguments) == (0, "weather", "")
    assert re.fullmatch(r"call_[A-Za-z0-9]{24}", first.id or "")
    assert second == CallPiece(0, '{"city": "Bo')
    assert reader.add('nn"}') == [CallPiece(0, 'nn"}')]


def test_an_answer_that_may_call_once_is_done_behind_its_first_call() -> None:
    reader = ToolReader(FORMATS["hermes"], NAMES, several=False)
    reader.add(f"<tool_call>\n{WEATHER}")
    assert reader.done
    assert reader.add(f"\n</tool_call>\n<tool_call>\n{WEATHER}") == reader.finish() == []
    assert reader.calls == 1


def test_a_call_that_is_cut_off_has_the_arguments_that_came() -> None:
    assert read("hermes", '<tool_call>{"name": "time", "arguments": {"a": ') == [("time", '{"a": ')]


def test_ids_have_nine_letters_where_the_chat_template_wants_that() -> None:
    (piece, *_) = ToolReader(FORMATS["mistral"], NAMES, several=True).add(f"[TOOL_CALLS][{WEATHER}]")
    assert isinstance(piece, CallPiece)
    assert re.fullmatch(r"[A-Za-z0-9]{9}", piece.id or "")
