"""Text files become one document each; what cannot be taken is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import InputError
from luthier.ingest.decoding import MAX_LINE_CHARS
from luthier.ingest.documents import document_files, read_documents
from luthier.ingest.formats import detect_format
from luthier.ingest.importing import import_examples
from luthier.records.dataset import BadRow
from luthier.records.example import Example


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"b.txt": b"Second\r\nline", "a/one.MD": b"\xef\xbb\xbf# First", "c.txt": b" \n", "d.txt": b"caf\xe9"}
    for name, content in {**files, ".git/x.txt": b"hidden", "e.pdf": b"not text"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_each_file_of_a_folder_is_a_document_and_the_rest_is_left(folder: Path) -> None:
    rows = list(read_documents(folder, "utf-8"))
    assert [row.fields for row in rows if isinstance(row, Example)] == [
        {"text": "# First", "source": "a/one.MD"},
        {"text": "Second\nline", "source": "b.txt"},
    ]
    bad = {row.line: row.reason for row in rows if isinstance(row, BadRow)}
    assert bad[3] == "c.txt has nothing but white space"
    assert "d.txt byte 0xE9 is not valid utf-8" in bad[4]


def test_import_of_a_folder_counts_bytes_and_documents(folder: Path) -> None:
    taken: list[Example] = []
    seen: list[tuple[int, int]] = []
    fmt = detect_format(folder)
    report = import_examples(folder, fmt, taken.append, on_progress=lambda done, total: seen.append((done, total)))
    assert (report.taken, report.left, report.fields) == (2, 2, ("text", "source"))
    total = sum(file.stat().st_size for file in document_files(folder))
    assert seen[-1] == (total, total)
    assert [example.id for example in taken] == ["document-0000001", "document-0000002"]


def test_single_file_is_one_document_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("Once, upon a time.\n\nThe end.")
    taken: list[Example] = []
    import_examples(path, detect_format(path), taken.append)
    assert [example.fields for example in taken] == [{"text": path.read_text(), "source": "book.txt"}]


def test_document_that_is_too_long_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a" * (MAX_LINE_CHARS + 1))
    with pytest.raises(InputError, match="cut it into several files"):
        import_examples(path, detect_format(path), lambda _: None)
