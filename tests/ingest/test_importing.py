"""An import writes the good rows, reports the bad ones, and refuses files that give nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import InputError
from luthier.ingest.formats import detect_format
from luthier.ingest.importing import MAX_BAD_ROWS_KEPT, MAX_FIELDS_KEPT, import_examples
from luthier.records.dataset import SourceFormat
from luthier.records.example import Example

CSV = SourceFormat(kind="csv", delimiter=",")


def put(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_import_writes_good_rows_in_order_and_reports_the_rest(tmp_path: Path) -> None:
    path = put(tmp_path, "text,label\na,x\nb\nc,y\n")
    taken: list[Example] = []
    report = import_examples(path, detect_format(path), taken.append)
    assert [example.fields["text"] for example in taken] == ["a", "c"]
    assert (report.taken, report.left, report.fields, report.format) == (2, 1, ("text", "label"), CSV)
    assert [row.line for row in report.bad_rows] == [3]


def test_fields_are_the_union_in_order_of_first_appearance(tmp_path: Path) -> None:
    path = put(tmp_path, '{"b": 1}\n{"a": 1, "b": 2}\n{"c": 1}\n')
    assert import_examples(path, SourceFormat(kind="jsonl"), lambda _: None).fields == ("b", "a", "c")


def test_fields_kept_are_bounded(tmp_path: Path) -> None:
    path = put(tmp_path, "".join(f'{{"f{number}": 1}}\n' for number in range(MAX_FIELDS_KEPT * 2)))
    report = import_examples(path, SourceFormat(kind="jsonl"), lambda _: None)
    assert len(report.fields) == MAX_FIELDS_KEPT


def test_all_bad_rows_are_counted_and_the_first_thousand_kept(tmp_path: Path) -> None:
    path = put(tmp_path, "text,label\na,x\n" + "b\n" * (MAX_BAD_ROWS_KEPT + 5))
    report = import_examples(path, CSV, lambda _: None)
    assert (report.left, len(report.bad_rows)) == (MAX_BAD_ROWS_KEPT + 5, MAX_BAD_ROWS_KEPT)


def test_file_that_gives_no_example_is_refused_with_its_problems(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        import_examples(put(tmp_path, "text,label\na\nb\n"), CSV, lambda _: None)
    assert caught.value.problems == tuple(f"line {line}: has 1 column, the header has 2" for line in (2, 3))
    assert "delimiter ','" in str(caught.value)


def test_file_with_only_a_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows below its header"):
        import_examples(put(tmp_path, "text,label\n"), CSV, lambda _: None)


def test_too_many_bad_rows_are_refused_when_a_share_is_set(tmp_path: Path) -> None:
    path = put(tmp_path, "text,label\na,x\nb\n")
    with pytest.raises(InputError, match="1 of 2 rows"):
        import_examples(path, CSV, lambda _: None, max_bad_share=0.4)
    assert import_examples(path, CSV, lambda _: None, max_bad_share=0.5).taken == 1


def test_progress_never_goes_back_and_ends_at_the_size_of_the_file(tmp_path: Path) -> None:
    path = put(tmp_path, "text,label\n" + f"{'word ' * 100},x\n" * 10_000)
    seen: list[tuple[int, int]] = []
    import_examples(path, CSV, lambda _: None, on_progress=lambda done, total: seen.append((done, total)))
    size = path.stat().st_size
    assert seen[-1] == (size, size)
    assert len(seen) >= 4
    assert seen == sorted(seen)


def test_later_bytes_of_another_encoding_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "late.csv"
    path.write_bytes(b"text,label\n" + b"plain text,x\n" * 100_000 + b"caf\xe9,y\n" + b"more,x\n")
    report = import_examples(path, detect_format(path), lambda _: None)
    assert (report.taken, report.left) == (100_001, 1)
    assert report.bad_rows[0].line == 100_002
    assert "--encoding" in report.bad_rows[0].reason
