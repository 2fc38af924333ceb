"""Check an uploaded file against what its purpose needs, line by line, before anybody relies on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.ingest.readers import read_rows
from luthier.ingest.training_rows import read_training_rows
from luthier.records.batch import BATCH_ENDPOINTS
from luthier.records.dataset import BadRow, SourceFormat
from luthier.records.eval import GivenRow
from luthier.records.example import Example
from luthier.records.file import FilePurpose

PROBLEMS_SHOWN = 20
MAX_CUSTOM_ID = 512


def problems_of(path: Path, purpose: FilePurpose) -> str | None:
    """Return why a file cannot be used for its purpose, with the lines; None where it can, or where any file can."""
    readers = {"fine-tune": read_training_rows, "batch": read_requests, "evals": read_eval_rows}
    if purpose not in readers:
        return None
    rows = 0
    bad: list[BadRow] = []
    for row in readers[purpose](path):
        rows += 1
        if isinstance(row, BadRow):
            bad.append(row)
    if not rows:
        return "The file has no lines."
    if not bad:
        return None
    shown = [f"line {row.line}: {row.reason}" for row in bad[:PROBLEMS_SHOWN]]
    more = [f"… and {len(bad) - PROBLEMS_SHOWN:,} more"] if len(bad) > PROBLEMS_SHOWN else []
    return "\n".join([f"{len(bad):,} of {rows:,} lines cannot be used:", *shown, *more])


def read_requests(path: Path) -> Iterator[Example | BadRow]:
    """Yield the lines of a batch: ``custom_id``, ``method``, ``url`` and ``body`` as fields, or what is wrong."""
    seen: set[str] = set()
    for row in _read_items(path):
        if isinstance(row, BadRow):
            yield row
            continue
        problems = _request_problems(row, seen)
        seen.add(str(row.fields.get("custom_id")))
        yield BadRow(line=row.line or 0, reason="; ".join(problems)) if problems else row


def _request_problems(row: Example, seen: set[str]) -> list[str]:
    custom_id, method, url, body = (row.fields.get(name) for name in ("custom_id", "method", "url", "body"))
    problems = []
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        problems.append(f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} letters")
    elif custom_id in seen:
        problems.append(f"custom_id {custom_id!r} was there before")
    if method != "POST":
        problems.append(f"method must be 'POST', not {method!r}")
    if url not in BATCH_ENDPOINTS:
        problems.append(f"url must be one of {', '.join(BATCH_ENDPOINTS)}, not {url!r}")
    if not isinstance(body, dict):
        problems.append("body must be an object")
    elif body.get("stream"):
        problems.append("body.stream: a batch has no streams")
    return problems


def read_eval_rows(path: Path) -> Iterator[Example | BadRow]:
    """Yield the lines of an eval: ``item`` and perhaps ``sample`` as fields, or what is wrong."""
    for row in _read_items(path):
        problems = [] if isinstance(row, BadRow) else row_problems(dict(row.fields))
        yield BadRow(line=row.line or 0, reason="; ".join(problems)) if problems else row


def row_problems(row: dict[str, Any]) -> list[str]:
    """Return what a row of an eval lacks: an object ``item``, and a sound ``sample`` where there is one."""
    try:
        GivenRow.model_validate(row)
    except ValidationError as error:
        return [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
    return []


def _read_items(path: Path) -> Iterator[Example | BadRow]:
    return read_rows(path, SourceFormat(kind="jsonl"))
