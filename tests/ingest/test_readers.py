"""Every row of a file becomes an example or a bad row with its line and reason."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.ingest.decoding import MAX_LINE_CHARS
from luthier.ingest.readers import MAX_FIELD_CHARS, read_rows
from luthier.records.dataset import BadRow, SourceFormat
from luthier.records.example import Example

CSV = SourceFormat(kind="csv", delimiter=",")
JSONL = SourceFormat(kind="jsonl")
CHAT = SourceFormat(kind="chat")
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


def read(tmp_path: Path, content: str | bytes, fmt: SourceFormat = CSV) -> tuple[list[Example], dict[int, str]]:
    path = tmp_path / "data"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(fmt.encoding))
    rows = list(read_rows(path, fmt))
    bad = {row.line: row.reason for row in rows if isinstance(row, BadRow)}
    return [row for row in rows if isinstance(row, Example)], bad


def chat_line(*messages: dict[str, Any], **others: Any) -> str:
    return json.dumps({"messages": messages, **others}) + "\n"


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def test_csv_values_stay_as_they_are_under_stripped_names(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, "\ufeff text , label\r\n  two  spaces ,007\r\n")
    assert examples == [Example(id="row-0000002", fields={"text": "  two  spaces ", "label": "007"}, line=2)]
    assert bad == {}


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_csv_gives_back_whatever_was_written(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("a", "b"), *rows])
    examples, bad = read(tmp_path_factory.mktemp("csv"), text.getvalue())
    assert [tuple(example.fields.values()) for example in examples] == rows
    assert bad == {}


def test_lines_are_physical_lines_where_the_row_starts(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, 'text,label\n"one\ntwo\r\nthree",x\n\nshort\n"a\nb",y\n"a\nb",y,z\n')
    assert [example.line for example in examples] == [2, 7]
    assert examples[0].fields["text"] == "one\ntwo\r\nthree"
    assert bad[6] == "has 1 column, the header has 2"
    assert bad[9].startswith("has 3 columns, the header has 2 (lines 9 to 10")


def test_blank_rows_and_nul_bytes_are_bad_rows_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, "text,label\n , \n\na\0b,x\ngood,y\n")
    assert [example.line for example in examples] == [5]
    assert bad == {2: "is blank in every column", 4: "has a NUL character"}


def test_quote_that_is_never_closed_is_one_bad_row_with_its_line(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, 'text,label\ngood,x\n"never closed,y\nlost,z\nlost too,z\n')
    assert [example.line for example in examples] == [2]
    assert bad == {3: "a quote is opened in this row and never closed: lines 3 to 5 could not be read"}


def test_last_row_without_a_line_end_is_taken(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, 'text,label\ngood,"x"')
    assert (len(examples), bad) == (1, {})


def test_field_over_the_limit_is_a_bad_row_and_reading_goes_on(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, f"text,label\n{'a' * (MAX_FIELD_CHARS + 1)},x\n{'a' * 200_000},y\n")
    assert [example.line for example in examples] == [3]
    assert bad == {2: "has a field of more than 10,000,000 characters"}


def test_line_over_the_limit_is_a_bad_row_and_reading_goes_on(tmp_path: Path) -> None:
    long = json.dumps({"text": "a" * (MAX_LINE_CHARS * 2)})
    examples, bad = read(tmp_path, f'{long}\n{{"text": "good"}}\n', JSONL)
    assert [example.line for example in examples] == [2]
    assert "more than 16,000,000 characters" in bad[1]


@pytest.mark.parametrize("fmt", [CSV, JSONL])
def test_bytes_of_another_encoding_are_bad_rows_that_name_the_option(tmp_path: Path, fmt: SourceFormat) -> None:
    lines = {"csv": b"text,label\ncaf\xe9,x\ncafe,y\n", "jsonl": b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": 2}\n'}
    examples, bad = read(tmp_path, lines[fmt.kind], fmt)
    assert examples[-1].line == 3
    assert "byte 0xE9 is not valid utf-8" in bad[2]
    assert "--encoding cp1252" in bad[2]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "shift_jis", "gb18030", "cp1252", "utf-8-sig"])
def test_broken_bytes_of_any_encoding_do_not_end_the_reading(tmp_path: Path, encoding: str) -> None:
    content = "text,label\ngood,x\n".encode(encoding) + b"\x81\xd8\x00\xdc\xff\xff\x81"
    rows = read(tmp_path, content, SourceFormat(kind="csv", delimiter=",", encoding=encoding))
    assert rows[0][0].fields["text"] == "good"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,,label,\n", ["column 2 has no name", "column 4 has no name"]),
        ("a,b, a,c,b\n", ["columns 1, 3 have the same name 'a'", "columns 2, 5 have the same name 'b'"]),
        ("", ["empty"]),
        ("\n\n", ["empty"]),
        ('"text,label\na,b\n', ["never closed"]),
        ("1,2.5,Somehow I was blessed\n", ["'2.5' is a number", "'1' is a number"]),
    ],
)
def test_header_that_does_not_name_the_columns_is_refused(tmp_path: Path, content: str, said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    assert all(part in str(caught.value) for part in said)


def test_jsonl_keeps_values_and_skips_blank_lines(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, '\n{"a": 1, "b": [null, {"c": " x "}]}\r\n\n{"d": "\u2028"}', JSONL)
    assert [example.id for example in examples] == ["row-0000002", "row-0000004"]
    assert examples[0].fields == {"a": 1, "b": [None, {"c": " x "}]}
    assert examples[1].fields == {"d": "\u2028"}
    assert bad == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": ', "not valid JSON"),
        ("[1, 2]", "is an array, not a JSON object"),
        ("null", "is null"),
        ("3.5", "is a number"),
        ("{}", "empty object"),
        ('{" ": 1}', "field without a name"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "4300"),
        ('{"a": "\\u0000"}', "NUL"),
        ('{"a": ["\\ud83d"]}', "surrogate"),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}", "nested deeper than 100"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 100"),
    ],
)
def test_json_that_cannot_be_an_example_is_a_bad_row(tmp_path: Path, line: str, said: str) -> None:
    examples, bad = read(tmp_path, f'{line}\n{{"a": 1}}\n', JSONL)
    assert said in bad[1]
    assert [example.line for example in examples] == [2]


def test_escapes_that_only_look_dangerous_are_taken(tmp_path: Path) -> None:
    examples, bad = read(tmp_path, '{"a": "\\ud83d\\ude00 C:\\\\u0000"}\n', JSONL)
    assert examples[0].fields == {"a": "😀 C:\\u0000"}
    assert bad == {}


def test_chat_takes_openai_messages_and_keeps_other_keys(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}
    line = chat_line(
        {"role": "developer", "content": "Be brief"}, parts, ASSISTANT | {"weight": 0}, USER, ASSISTANT, id=7
    )
    examples, bad = read(tmp_path, line, CHAT)
    assert bad == {}
    assert examples[0].fields == {"id": 7}
    assert [(m.role, m.content, m.weight) for m in examples[0].messages or ()] == [
        ("system", "Be brief", 1),
        ("user", "a b", 1),
        ("assistant", "hello", 0),
        ("user", "hi", 1),
        ("assistant", "hello", 1),
    ]


def test_pairs_of_answers_are_examples_and_broken_ones_bad_rows_with_their_line(tmp_path: Path) -> None:
    pair = {"input": {"messages": [USER]}, "preferred_output": [ASSISTANT], "label": "a"}
    good = json.dumps(pair | {"non_preferred_output": [ASSISTANT | {"content": "no"}]})
    equal = json.dumps(pair | {"non_preferred_output": [ASSISTANT]})
    (example,), bad = read(tmp_path, f"{good}\n{equal}\n", CHAT)
    assert [message.content for message in (*(example.messages or ()), *(example.rejected or ()))] == [
        "hi",
        "hello",
        "no",
    ]
    assert example.fields == {"label": "a"}
    assert bad == {2: "preferred_output and non_preferred_output are equal: there is nothing to prefer"}


def test_all_problems_of_a_row_are_in_one_reason(tmp_path: Path) -> None:
    line = chat_line({"role": "wizard", "content": 3}, USER | {"weight": 0}, tools=[{"type": "function"}])
    reason = read(tmp_path, line, CHAT)[1][1]
    for part in ("unknown role", "a number for content", "only assistant", "no assistant message", "tools[0] has"):
        assert part in reason


@pytest.mark.parametrize("kind", ["csv", "chat"])
def test_reading_takes_the_same_memory_for_any_number_of_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "many"
    header, row = {"csv": ("text,label\n", '"some words, here",x\n'), "chat": ("", chat_line(USER, ASSISTANT))}[kind]
    path.write_text(header + row * (200_000 if kind == "csv" else 20_000))
    fmt = CSV if kind == "csv" else CHAT
    tracemalloc.start()
    try:
        rows = sum(1 for _ in read_rows(path, fmt))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows >= 20_000
    assert peak < 1_000_000
