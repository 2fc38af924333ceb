"""How a file is read is found out, or said clearly to be impossible."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from luthier.errors import InputError, NotFoundError
from luthier.ingest.formats import SAMPLE_BYTES, detect_format

ROWS = "text{0}label\nGood morning{0}positive\nAwful service{0}negative\n"
CHAT = '{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}\n'


def put(tmp_path: Path, content: str | bytes, name: str = "data.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_is_the_one_that_gives_every_row_the_width_of_the_header(tmp_path: Path, delimiter: str) -> None:
    fmt = detect_format(put(tmp_path, ROWS.format(delimiter)))
    assert (fmt.kind, fmt.encoding, fmt.delimiter) == ("csv", "utf-8", delimiter)


def test_delimiters_inside_quotes_and_texts_do_not_count(tmp_path: Path) -> None:
    text = 'text;label\n"a; b, c, d";x\n"one\ntwo; three";y\nwell, well, well;z\n'
    assert detect_format(put(tmp_path, text)).delimiter == ";"


def test_single_column_is_read_with_commas(tmp_path: Path) -> None:
    assert detect_format(put(tmp_path, "text\nhello\nworld\n", "data.csv")).delimiter == ","


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_encodings_are_told_with_and_without_a_mark(tmp_path: Path, encoding: str) -> None:
    fmt = detect_format(put(tmp_path, ROWS.format(";").encode(encoding)))
    assert (fmt.encoding, fmt.delimiter) == (encoding, ";")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Café “très bon” – déjà vu"),
        ("cp1252", "The food’s great, I’d pay £5"),
        ("cp1251", "Привет мир, как дела у вас сегодня"),
        ("cp932", "こんにちは世界、これはテストです"),
        ("gb18030", "你好世界这是一个测试句子"),
        ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy"),
    ],
)
def test_text_that_is_not_utf8_is_read_in_its_own_encoding(tmp_path: Path, encoding: str, text: str) -> None:
    content = ("text;label\n" + f"{text};x\n" * 5).encode(encoding)
    fmt = detect_format(put(tmp_path, content))
    assert text in content.decode(fmt.encoding)


def test_one_broken_byte_does_not_make_a_utf8_file_something_else(tmp_path: Path) -> None:
    content = b"text,label\n" + "naïve café,x\n".encode() * 5 + b"caf\xe9,y\n"
    assert detect_format(put(tmp_path, content)).encoding == "utf-8"


def test_sample_that_ends_inside_a_character_is_still_utf8(tmp_path: Path) -> None:
    content = b"text\n" + "é".encode() * SAMPLE_BYTES
    assert detect_format(put(tmp_path, content)).encoding == "utf-8"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"text": "a", "label": "b"}\n', "jsonl"),
        (CHAT, "chat"),
        ('{"id": 7, ' + CHAT[1:], "chat"),
        ("\n\nnot json\n" + CHAT, "csv"),
        ("\ufeff" + CHAT, "chat"),
        ("{curly},label\na,b\n", "csv"),
        ('{"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}', "chat"),
        ('{"prompt": [], "chosen": [], "rejected": []}', "chat"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "jsonl"),
        ('{"input": {"messages": [{"role": "user", "content": "' + "a" * SAMPLE_BYTES, "chat"),
    ],
)
def test_kind_is_told_by_the_first_object(tmp_path: Path, content: str, kind: str) -> None:
    assert detect_format(put(tmp_path, content, "data")).kind == kind


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", "Hello, world.", "text"),
        ("a.txt", "Hello, world.\nThis is prose, and so on, and on.\nIt goes on.\n", "text"),
        ("a.txt", ROWS.format("\t"), "csv"),
        ("a.md", ROWS.format("|"), "text"),
        ("a.txt", CHAT, "chat"),
        ("a.csv", "Hello, world.", "csv"),
    ],
)
def test_text_files_are_documents_unless_they_hold_a_table(tmp_path: Path, name: str, content: str, kind: str) -> None:
    assert detect_format(put(tmp_path, content, name)).kind == kind


def test_folder_of_text_files_is_read_as_text_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, "Hello", "a.md")
    assert detect_format(tmp_path) == detect_format(tmp_path, kind="text")
    assert detect_format(tmp_path, encoding="cp1252").encoding == "cp1252"
    with pytest.raises(InputError, match="not as csv"):
        detect_format(tmp_path, kind="csv")
    with pytest.raises(InputError, match="A delimiter"):
        detect_format(tmp_path, delimiter=";")


def test_broken_first_line_of_a_jsonl_file_does_not_make_it_csv(tmp_path: Path) -> None:
    assert detect_format(put(tmp_path, "oops\n" + CHAT, "a.jsonl")).kind == "chat"


def test_what_the_user_names_is_taken(tmp_path: Path) -> None:
    fmt = detect_format(put(tmp_path, ROWS.format(",")), kind="csv", encoding="Latin1", delimiter="tab")
    assert (fmt.kind, fmt.encoding, fmt.delimiter) == ("csv", "iso8859-1", "\t")


def test_utf16_named_without_a_mark_gets_its_byte_order(tmp_path: Path) -> None:
    path = put(tmp_path, ROWS.format(",").encode("utf-16-be"))
    assert detect_format(path, encoding="utf-16").encoding == "utf-16-be"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encoding": "utf8x"}, "Did you mean 'utf8'"),
        ({"encoding": "klingon"}, "Common ones are"),
        ({"encoding": "rot13"}, "not an encoding of text files"),
        ({"kind": "jsnl"}, "Did you mean 'jsonl'"),
        ({"delimiter": "::"}, "not one character"),
        ({"kind": "jsonl", "delimiter": ","}, "not as CSV"),
    ],
)
def test_unknown_options_are_refused_with_a_suggestion(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        detect_format(put(tmp_path, ROWS.format(",")), **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\r\n", "nothing but white space"),
        (gzip.compress(b"a,b\n", mtime=0), "gunzip"),
        (b"PK\x03\x04....", "spreadsheet"),
        (b'[{"text": "a"}]', "jq -c"),
    ],
)
def test_files_that_are_no_rows_of_text_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        detect_format(put(tmp_path, content))
    assert said in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        detect_format(tmp_path / "none.csv")
    with pytest.raises(InputError):
        detect_format(tmp_path)
