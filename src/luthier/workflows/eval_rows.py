"""The rows that a run evaluates: from the request, a file or the production log, each an item and perhaps a sample."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from luthier.errors import InputError
from luthier.evaluate.item_schema import ItemSchema
from luthier.ingest.readers import read_rows
from luthier.ingest.uploaded import row_problems
from luthier.records.dataset import BadRow, SourceFormat
from luthier.records.eval import FileContent, FileId, RowSource
from luthier.store.store import Store
from luthier.workflows.eval_logs import logged_rows
from luthier.workflows.files import file_path

Json = dict[str, Any]
MAX_PROBLEMS = 20


class Row(NamedTuple):
    """A row with its number, from 0."""

    number: int
    item: Json
    sample: Json | None


def write_rows(store: Store, project: str, source: RowSource, schema: ItemSchema | None, target: Path) -> int:
    """Write all rows of a source to a file, whole or not at all, and return how many they are.

    Raises:
        InputError: some do not fit, or there are none.
        NotFoundError: the file is not there any more.
    """
    fresh = target.with_suffix(".new")
    problems: list[str] = []
    count = 0
    with fresh.open("w", encoding="utf-8") as file:
        for place, row in _rows(store, project, source):
            count += 1
            problems += [f"{place}: {problem}" for problem in problems_of(row, schema)]
            if len(problems) > MAX_PROBLEMS:
                break
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if problems:
        raise InputError("Some of the rows cannot be evaluated.", problems=problems)
    if not count:
        raise InputError("There is nothing to evaluate: the source has no rows.")
    fresh.replace(target)
    return count


def problems_of(row: Json | str, schema: ItemSchema | None) -> list[str]:
    """Return what is wrong with a row; a text is what a reader found to be wrong.

    Raises:
        InputError: the schema cannot be used.
    """
    if isinstance(row, str):
        return [row]
    problems = row_problems(row)
    return schema.problems(row["item"]) if schema and not problems else problems


def read_written_rows(path: Path, without: set[int]) -> Iterator[Row]:
    """Yield the rows that were written to a file, but for those of some numbers."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number not in without:
                row = json.loads(line)
                yield Row(number, row["item"], row.get("sample"))


def _rows(store: Store, project: str, source: RowSource) -> Iterable[tuple[str, Json | str]]:
    """Yield each row with the place where it stands; a text says what is wrong with it."""
    if isinstance(source, FileContent):
        rows = (row.model_dump(include={"item", "sample"}) for row in source.content)
        return ((f"content[{number}]", row) for number, row in enumerate(rows))
    if isinstance(source, FileId):
        lines = read_rows(file_path(store, project, source.id), SourceFormat(kind="jsonl"))
        return ((f"line {row.line}", row.reason if isinstance(row, BadRow) else dict(row.fields)) for row in lines)
    return ((f"logged row {number}", row) for number, row in enumerate(logged_rows(store, project, source)))
