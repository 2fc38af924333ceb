"""Read a source file into examples, row by row and in constant memory.

In: a path and a :class:`~luthier.records.dataset.SourceFormat`. Out: an :class:`~luthier.records.example.Example` for
each good row and a :class:`~luthier.records.dataset.BadRow` for each row that breaks a rule, in the order of the file.
Nothing is dropped without a word, except empty lines. Values stay as they are: no trimming, no conversion.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from luthier.errors import InputError
from luthier.ingest.chat_rows import read_chat_row
from luthier.ingest.decoding import ERROR_HANDLER, MAX_LINE_CHARS, text_problem
from luthier.ingest.documents import read_documents
from luthier.ingest.json_types import json_type
from luthier.records.dataset import BadRow, SourceFormat
from luthier.records.example import Example

MAX_FIELD_CHARS = 10_000_000
MAX_DEPTH = 100
MAX_HEADER_NAME_CHARS = 120
REPORT_BYTES = 1 << 20


class SourceLines:
    """The physical lines of a text file, at most 16 M characters of each, with where the reading stands.

    ``number`` is the line given last, from 1; ``cut`` is the last line that was too long to keep; ``exhausted`` says
    that a line was asked for after the last one.
    """

    def __init__(self, file: TextIO, on_bytes: Callable[[int], None] | None = None) -> None:
        self.number = 0
        self.cut = 0
        self.exhausted = False
        self._file = file
        self._on_bytes = on_bytes
        self._bytes_reported = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_CHARS)
        if not line:
            self.exhausted = True
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix("\ufeff")
        if len(line) == MAX_LINE_CHARS and not line.endswith("\n"):
            self._skip_rest_of_line()
        if self._on_bytes:
            self._report_bytes(self._on_bytes)
        return line

    def _skip_rest_of_line(self) -> None:
        self.cut = self.number
        rest = "…"
        while rest and not rest.endswith("\n"):
            rest = self._file.readline(MAX_LINE_CHARS)

    def _report_bytes(self, on_bytes: Callable[[int], None]) -> None:
        done = self._file.buffer.tell()
        if done - self._bytes_reported >= REPORT_BYTES:
            self._bytes_reported = done
            on_bytes(done)


def read_rows(
    path: Path, fmt: SourceFormat, *, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Example | BadRow]:
    """Yield each row of a file as an example, or as a bad row with its line and every rule it breaks.

    Args:
        path: The source file; for plain text, also a folder.
        fmt: How to read it, from :func:`luthier.ingest.formats.detect_format`.
        on_bytes: Called about once per MiB with the bytes read so far.

    Raises:
        InputError: A CSV file has no header, or a header with empty or repeated names.
    """
    if fmt.kind == "text":
        yield from read_documents(path, fmt.encoding, on_bytes=on_bytes)
        return
    newline = "" if fmt.kind == "csv" else "\n"
    with path.open(encoding=fmt.encoding, errors=ERROR_HANDLER, newline=newline) as file:
        lines = SourceLines(file, on_bytes)
        yield from _read_csv(lines, fmt) if fmt.kind == "csv" else _read_json_lines(lines, fmt)


def _example_id(line: int) -> str:
    return f"row-{line:07d}"


# CSV


def _read_csv(lines: SourceLines, fmt: SourceFormat) -> Iterator[Example | BadRow]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    reader = csv.reader(lines, delimiter=fmt.delimiter or ",")
    names = _read_header(reader, lines, fmt.encoding)
    while True:
        start = lines.number + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(line=start, reason=_csv_error_reason(error, start, lines.number))
            continue
        if not values:
            continue
        reason = _csv_problem(values, names, start, lines, fmt.encoding)
        if reason:
            yield BadRow(line=start, reason=reason)
        else:
            yield Example(id=_example_id(start), fields=dict(zip(names, values, strict=True)), line=start)


def _read_header(reader: Iterator[list[str]], lines: SourceLines, encoding: str) -> list[str]:
    try:
        row = next((row for row in reader if row), None)
    except csv.Error as error:
        raise InputError(f"The header of the CSV file cannot be read: {error}.") from error
    if row is None:
        raise InputError("The CSV file is empty; its first row must name the columns.")
    names = [name.strip().strip("\ufeff") for name in row]
    problems = _header_problems(names, encoding)
    if lines.exhausted:
        problems = ["a quote is opened in the first row and never closed"]
    if problems:
        raise InputError(
            "The first row of the CSV file does not name its columns.",
            problems=problems,
            hint="put a row with one short, different name for each column first, such as: text,label",
        )
    return names


def _header_problems(names: list[str], encoding: str) -> list[str]:
    problems = [f"column {number} has no name" for number, name in enumerate(names, 1) if not name]
    for name in dict.fromkeys(names):
        columns = [str(number) for number, other in enumerate(names, 1) if other == name]
        if name and len(columns) > 1:
            problems.append(f"columns {', '.join(columns)} have the same name {name[:MAX_HEADER_NAME_CHARS]!r}")
    for number, name in enumerate(names, 1):
        if len(name) > MAX_HEADER_NAME_CHARS or "\n" in name:
            problems.append(f"column {number} has a text for a name: {name[:60]!r}…")
        elif problem := text_problem(name, encoding):
            problems.append(f"the name of column {number} {problem}")
    return problems + _numbers_as_names(names)


def _numbers_as_names(names: list[str]) -> list[str]:
    """Find a first row that is data: fractions, or a number in front of other things (0, 1, 2, … are pandas' names)."""
    if all(name.isdigit() for name in names):
        return []
    suspects = [name for name in names if re.fullmatch(r"[-+]?\d+\.\d+", name)] + [names[0]] * names[0].isdigit()
    return [f"{name!r} is a number, not a name" for name in suspects]


def _csv_problem(values: list[str], names: list[str], start: int, lines: SourceLines, encoding: str) -> str | None:
    end = lines.number
    if lines.exhausted:
        return f"a quote is opened in this row and never closed: {_line_range(start, end)} could not be read"
    if lines.cut >= start:
        return f"has a line of more than {MAX_LINE_CHARS:,} characters"
    text = "".join(values)
    if not text or text.isspace():
        return "is blank in every column"
    problem = text_problem(text, encoding)
    if problem or len(values) == len(names):
        return problem
    reason = f"has {_columns(len(values))}, the header has {len(names)}"
    return reason if end == start else f"{reason} ({_line_range(start, end)} were read as one row: see its quotes)"


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _line_range(start: int, end: int) -> str:
    return f"line {start}" if start == end else f"lines {start} to {end}"


def _csv_error_reason(error: csv.Error, start: int, end: int) -> str:
    if "field limit" not in str(error):
        return f"is not valid CSV: {error}"
    reason = f"has a field of more than {MAX_FIELD_CHARS:,} characters"
    if end == start:
        return reason
    return f"{reason}, or a quote that is never closed: {_line_range(start, end)} could not be read"


# JSON lines


def _read_json_lines(lines: SourceLines, fmt: SourceFormat) -> Iterator[Example | BadRow]:
    read_object = _chat_example if fmt.kind == "chat" else _fields_example
    for line in lines:
        if line.isspace():
            continue
        try:
            if lines.cut == lines.number:
                raise ValueError(f"has more than {MAX_LINE_CHARS:,} characters")
            yield read_object(_parse_object(line, fmt.encoding), lines.number)
        except ValueError as error:
            yield BadRow(line=lines.number, reason=str(error))


def _parse_object(line: str, encoding: str) -> dict[str, Any]:
    if problem := text_problem(line, encoding):
        raise ValueError(problem)
    try:
        value = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite_float)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON (one object per line): {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {json_type(value)}, not a JSON object")
    if not value:
        raise ValueError("is an empty object")
    if line.count("[") + line.count("{") > MAX_DEPTH or "\\u0000" in line or "\\ud" in line.lower():
        _check_inside(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"has {name}, which is not JSON; use null or a number")


def _finite_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"has the number {text}, which is too large")
    return number


def _check_inside(value: Any) -> None:
    """Refuse what JSON can write but databases and UTF-8 cannot hold, and nesting that breaks whoever reads it next."""
    level = [value]
    for _ in range(MAX_DEPTH):
        texts = [item for item in level if isinstance(item, str)]
        inside = [part for item in level if isinstance(item, list) for part in item]
        inside += [part for item in level if isinstance(item, dict) for pair in item.items() for part in pair]
        if any("\0" in text for text in texts):
            raise ValueError("has a NUL character")
        if any(re.search("[\ud800-\udfff]", text) for text in texts):
            raise ValueError("has half of a surrogate pair (such as \\ud83d alone), which is not a character")
        level = inside
        if not level:
            return
    raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")


def _fields_example(row: dict[str, Any], line: int) -> Example:
    if any(not name.strip() for name in row):
        raise ValueError("has a field without a name")
    return Example(id=_example_id(line), fields=row, line=line)


def _chat_example(row: dict[str, Any], line: int) -> Example:
    chat = read_chat_row(row)
    return Example(id=_example_id(line), **chat._asdict(), line=line)
