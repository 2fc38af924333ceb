"""Read plain text: a file, or each text file of a folder, is one document.

In: a path. Out: an :class:`~luthier.records.example.Example` with the fields ``text`` and ``source`` (the file's path
below the folder) for each document, and a :class:`~luthier.records.dataset.BadRow` for each that cannot be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from luthier.ingest.decoding import ERROR_HANDLER, MAX_LINE_CHARS, text_problem
from luthier.records.dataset import BadRow
from luthier.records.example import Example

DOCUMENT_SUFFIXES = (".txt", ".md")


def document_files(path: Path) -> list[Path]:
    """Return the files of a folder and its subfolders that are documents, sorted; of a file, itself.

    Hidden files and folders (``.git``, say) are left out.
    """
    if not path.is_dir():
        return [path]
    files = (file for file in path.rglob("*") if file.suffix.lower() in DOCUMENT_SUFFIXES and file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))


def read_documents(
    path: Path, encoding: str, *, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Example | BadRow]:
    """Yield each document as an example, or as a bad row; their ``line`` is the number of the file, from 1.

    Args:
        path: A file or a folder.
        encoding: That of all files.
        on_bytes: Called after each file with the bytes read so far.
    """
    done = 0
    for number, file in enumerate(document_files(path), 1):
        source = file.relative_to(path).as_posix() if path.is_dir() else file.name
        yield _read_document(file, source, encoding, number)
        done += file.stat().st_size
        if on_bytes:
            on_bytes(done)


def _read_document(file: Path, source: str, encoding: str, number: int) -> Example | BadRow:
    try:
        with file.open(encoding=encoding, errors=ERROR_HANDLER) as opened:
            text = opened.read(MAX_LINE_CHARS + 1).removeprefix("\ufeff")
    except OSError as error:
        return BadRow(line=number, reason=f"{source} cannot be read: {error.strerror}")
    if problem := _document_problem(text, encoding):
        return BadRow(line=number, reason=f"{source} {problem}")
    return Example(id=f"document-{number:07d}", fields={"text": text, "source": source}, line=number)


def _document_problem(text: str, encoding: str) -> str | None:
    if len(text) > MAX_LINE_CHARS:
        return f"has more than {MAX_LINE_CHARS:,} characters: cut it into several files"
    if not text or text.isspace():
        return "has nothing but white space"
    return text_problem(text, encoding)
