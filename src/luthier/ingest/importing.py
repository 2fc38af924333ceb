"""Import a source file: every good row goes to a writer, every bad row into the report.

In: a path, its format and a function that takes one example (the caller's open file, say). Out: an
:class:`~luthier.records.dataset.ImportReport`. Memory does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from luthier.errors import InputError
from luthier.ingest.documents import document_files
from luthier.ingest.readers import read_rows
from luthier.records.dataset import BadRow, ImportReport, SourceFormat
from luthier.records.example import Example

MAX_BAD_ROWS_KEPT = 1_000
MAX_FIELDS_KEPT = 1_000


def import_examples(
    path: Path,
    fmt: SourceFormat,
    write: Callable[[Example], None],
    *,
    max_bad_share: float = 1.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Stream the good rows of a file to ``write`` and report what was taken and left.

    Args:
        path: The source file; for plain text, also a folder.
        fmt: How to read it, from :func:`luthier.ingest.formats.detect_format`.
        write: Takes each example, in the order of the file.
        max_bad_share: Refuse the file when a larger share of its rows is bad (0 allows none, 1 any but all).
        on_progress: Called about once per MiB and at the end with the bytes done and the bytes in all.

    Raises:
        InputError: The header of a CSV file is wrong, no row could be taken, or too many are bad. By then ``write``
            has had the good rows: the caller publishes them only after success.
    """
    total_bytes = sum(file.stat().st_size for file in document_files(path))
    on_bytes = (lambda done: on_progress(done, total_bytes)) if on_progress else None
    report = take_rows(read_rows(path, fmt, on_bytes=on_bytes), fmt, write)
    _check_taken(path, report, max_bad_share)
    if on_progress:
        on_progress(total_bytes, total_bytes)
    return report


def take_rows(rows: Iterable[Example | BadRow], fmt: SourceFormat, write: Callable[[Example], None]) -> ImportReport:
    """Give the good ones of some rows to ``write``, and report what was taken and left."""
    fields: dict[str, None] = {}
    bad_rows: list[BadRow] = []
    taken = left = 0
    for row in rows:
        if isinstance(row, BadRow):
            left += 1
            if len(bad_rows) < MAX_BAD_ROWS_KEPT:
                bad_rows.append(row)
            continue
        write(row)
        taken += 1
        if len(fields) < MAX_FIELDS_KEPT:
            fields.update(dict.fromkeys(row.fields))
    return ImportReport(
        format=fmt, taken=taken, left=left, fields=tuple(fields)[:MAX_FIELDS_KEPT], bad_rows=tuple(bad_rows)
    )


def _check_taken(path: Path, report: ImportReport, max_bad_share: float) -> None:
    fmt, taken, left = report.format, report.taken, report.left
    if taken and left <= max_bad_share * (taken + left):
        return
    problems = [f"line {row.line}: {row.reason}" for row in report.bad_rows]
    if not taken and not left:
        raise InputError(f"{path.name} has no rows{' below its header' if fmt.kind == 'csv' else ''}.")
    if taken:
        raise InputError(
            f"{left:,} of {taken + left:,} rows of {path.name} are bad; at most {max_bad_share:.0%} may be.",
            problems=problems,
        )
    raise InputError(
        f"No example could be taken from {path.name}: each of its {left:,} rows is bad.",
        problems=problems,
        hint=f"it was read as {_describe(fmt)}; name another format, encoding or delimiter if that is wrong",
    )


def _describe(fmt: SourceFormat) -> str:
    delimiter = f", delimiter {fmt.delimiter!r}" if fmt.delimiter else ""
    return f"{fmt.kind}, encoding {fmt.encoding}{delimiter}"
