"""Find out how a source file is to be read: its kind, its encoding, its delimiter.

In: the path of a file or folder a user named, and whatever the user said about it. Out: a
:class:`~luthier.records.dataset.SourceFormat` for :func:`luthier.ingest.readers.read_rows`. Only a bounded sample
from the start of the file is looked at; what the sample did not show is reported row by row when the file is read.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from encodings.aliases import aliases
from io import StringIO
from itertools import islice
from pathlib import Path

import charset_normalizer

from luthier.errors import InputError, NotFoundError, did_you_mean
from luthier.ingest.chat_rows import is_chat_row
from luthier.ingest.documents import DOCUMENT_SUFFIXES, document_files
from luthier.records.dataset import SourceFormat, SourceKind

KINDS: tuple[SourceKind, ...] = ("csv", "jsonl", "chat", "text")
DELIMITERS = (",", ";", "\t", "|")
DELIMITER_NAMES = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}
SAMPLE_BYTES = 1 << 20
DIALECT_RECORDS = 100
TABLE_FIT = 0.9
TABLE_LINES = 3
CHARSET_BYTES = 1 << 15
CODECS_NOT_FOR_FILES = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "unicode_escape"}

WESTERN = frozenset(
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüÿœßÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜŒ‘’‚“”„–—…€£¥§©®™°«»·¡¿•´ªº½\N{NO-BREAK SPACE}"
)

BOMS = (  # UTF-32 first: its little-endian mark starts with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PACKED = (
    (b"\x1f\x8b", "gzip-compressed", "unpack it first: gunzip --keep {name}"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
    (b"PAR1", "a Parquet file", "write it as JSONL first: pandas.read_parquet(…).to_json(…, lines=True)"),
)


def detect_format(
    path: Path, *, kind: str | None = None, encoding: str | None = None, delimiter: str | None = None
) -> SourceFormat:
    """Return how to read a file; each part that is not given is detected from the first MiB.

    Args:
        path: The source file, or a folder of ``.txt`` and ``.md`` files.
        kind: ``csv``, ``jsonl`` (an object of fields per line), ``chat`` (OpenAI's ``messages`` or a pair of answers
            per line) or ``text`` (a document per file).
        encoding: A name that Python knows, such as ``cp1252``.
        delimiter: One character, or ``comma``, ``semicolon``, ``tab``, ``pipe``; for CSV only.

    Raises:
        NotFoundError: There is no such file.
        InputError: The file is empty, packed or a JSON array, its encoding cannot be told, an option is unknown, or a
            folder has no text files.
    """
    if path.is_dir():
        return _folder_format(path, kind, encoding, delimiter)
    sample = _read_sample(path)
    codec = _named_encoding(encoding, sample) if encoding else _detected_encoding(sample, path.name)
    text = _decode_sample(sample, codec)
    if not text.strip("\x00 \t\r\n"):
        raise InputError(f"{path.name} has nothing but white space.")
    named = _named_kind(kind) if kind else None
    _refuse_json_array(text, path, named)
    found = named or _detected_kind(text, path)
    if found != "csv":
        _refuse_delimiter(path, found, delimiter)
        return SourceFormat(kind=found, encoding=codec)
    chosen = _named_delimiter(delimiter) if delimiter else _detected_delimiter(text)
    return SourceFormat(kind="csv", encoding=codec, delimiter=chosen)


def _folder_format(path: Path, kind: str | None, encoding: str | None, delimiter: str | None) -> SourceFormat:
    suffixes = " or ".join(DOCUMENT_SUFFIXES)
    if kind and _named_kind(kind) != "text":
        raise InputError(f"{str(path)!r} is a folder: its {suffixes} files are read as text, not as {kind}.")
    _refuse_delimiter(path, "text", delimiter)
    files = document_files(path)
    if not files:
        raise InputError(f"The folder {str(path)!r} has no {suffixes} file.")
    with files[0].open("rb") as file:
        start = file.read(4)
    return SourceFormat(kind="text", encoding=_named_encoding(encoding, start) if encoding else "utf-8")


def _refuse_delimiter(path: Path, kind: SourceKind, delimiter: str | None) -> None:
    if delimiter:
        raise InputError(f"A delimiter ({delimiter!r}) was given, but {path.name} is read as {kind}, not as CSV.")


def _read_sample(path: Path) -> bytes:
    if not path.exists():
        raise NotFoundError(f"There is no file {str(path)!r}.")
    try:
        with path.open("rb") as file:
            sample = file.read(SAMPLE_BYTES)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if not sample:
        raise InputError(f"{path.name} is empty.")
    for magic, what, hint in PACKED:
        if sample.startswith(magic):
            raise InputError(f"{path.name} is {what}, not text.", hint=hint.format(name=path.name))
    return sample


def _named_encoding(name: str, sample: bytes) -> str:
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError):
        known = {alias.replace("_", "-") for alias in (*aliases, *aliases.values())} | {"utf-8-sig"}
        hint = did_you_mean(name.lower().replace("_", "-"), known).strip()
        hint = hint if hint.startswith("Did") else "Common ones are utf-8, utf-16, cp1252, latin-1, shift_jis, gb18030."
        raise InputError(f"The encoding {name!r} is unknown.", hint=hint) from None
    if not getattr(info, "_is_text_encoding", True) or info.name in CODECS_NOT_FOR_FILES:
        raise InputError(f"{name!r} is not an encoding of text files.", hint="Common ones are utf-8, utf-16, cp1252.")
    if info.name in ("utf-16", "utf-32") and _bom_encoding(sample) != info.name:
        # Python's incremental decoders refuse these two without a byte order mark.
        big_endian = sample[:1] == b"\0"
        return f"{info.name}-{'be' if big_endian else 'le'}"
    return info.name


def _detected_encoding(sample: bytes, name: str) -> str:
    found = _bom_encoding(sample) or _wide_encoding(sample)
    if found:
        return found
    complete = sample[: sample.rfind(b"\n") + 1] if len(sample) == SAMPLE_BYTES else sample
    lines = [line for line in (complete or sample).split(b"\n") if not line.isascii()]
    # A few broken bytes do not turn a UTF-8 file into another: text in other encodings is hardly ever valid UTF-8.
    if sum(map(_is_utf8, lines)) * 2 >= len(lines):
        return "utf-8"
    return _guessed_encoding(b"\n".join(lines)[:CHARSET_BYTES], name)


def _bom_encoding(sample: bytes) -> str | None:
    return next((encoding for bom, encoding in BOMS if sample.startswith(bom)), None)


def _wide_encoding(sample: bytes) -> str | None:
    """Recognise UTF-16 without a byte order mark: every other byte of mostly Latin text is zero."""
    start = sample[:4096]
    even, odd = start[0::2].count(0), start[1::2].count(0)
    few, many = len(start) * 0.02, len(start) * 0.2
    if odd > many and even <= few:
        return "utf-16-le"
    return "utf-16-be" if even > many and odd <= few else None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _guessed_encoding(text: bytes, name: str) -> str:
    if _is_plain_western(text):
        return "cp1252"
    best = charset_normalizer.from_bytes(text).best()
    if best is None:
        raise InputError(
            f"The encoding of {name} cannot be told: it is not UTF-8, and no other one fits.",
            hint="name it with --encoding, for example --encoding cp1252",
        )
    return codecs.lookup(best.encoding).name


def _is_plain_western(text: bytes) -> bool:
    """Tell whether cp1252 gives mostly ASCII with the accents and quotes of Western European languages.

    charset-normalizer finds a dozen single-byte encodings equally good for such text, and cp1252 is by far the
    commonest of them.
    """
    decoded = text.decode("cp1252", "replace")
    beyond_ascii = [character for character in decoded if not character.isascii()]
    ascii_letters = sum(character.isascii() and character.isalpha() for character in decoded)
    return set(beyond_ascii) <= WESTERN and len(beyond_ascii) <= 0.6 * ascii_letters


def _decode_sample(sample: bytes, encoding: str) -> str:
    text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
    return text.removeprefix("\ufeff")


def _named_kind(kind: str) -> SourceKind:
    if kind not in KINDS:
        raise InputError(f"The format {kind!r} is unknown.{did_you_mean(kind, KINDS)}")
    return kind


def _refuse_json_array(text: str, path: Path, kind: SourceKind | None) -> None:
    if kind in ("csv", "text") or not text.lstrip().startswith("["):
        return
    if kind or path.suffix.lower() in (".json", ".jsonl") or re.match(r"\s*\[\s*\{", text):
        raise InputError(
            f"{path.name} is one JSON array; JSONL has one object per line.",
            hint=f"convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )


def _detected_kind(text: str, path: Path) -> SourceKind:
    looks_like_json = re.match(r'\s*\{\s*"', text) or path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    if not looks_like_json:
        return "text" if _is_document(text, path) else "csv"
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return "chat" if is_chat_row(value) else "jsonl"
    # The first row is longer than the sample, or broken.
    return "chat" if re.match(r'\s*\{\s*"(messages"\s*:|input"\s*:\s*\{\s*"messages")', text) else "jsonl"


def _is_document(text: str, path: Path) -> bool:
    """Tell prose from a table saved as ``.txt``: that has three lines, and nearly all have the header's columns."""
    if path.suffix.lower() not in DOCUMENT_SUFFIXES:
        return False
    if (
        path.suffix.lower() != ".txt"
        or sum(not line.isspace() for line in text.splitlines(keepends=True)) < TABLE_LINES
    ):
        return True
    fits = (_dialect_fit(text, delimiter) for delimiter in DELIMITERS)
    return not any(share >= TABLE_FIT and columns > 1 for share, columns in fits)


def _named_delimiter(delimiter: str) -> str:
    character = DELIMITER_NAMES.get(delimiter.lower(), delimiter)
    if len(character) != 1 or character in '"\r\n\0':
        raise InputError(
            f"The delimiter {delimiter!r} is not one character.",
            hint=f"use one character, or one of {', '.join(name for name in DELIMITER_NAMES if name.isalpha())}",
        )
    return character


def _detected_delimiter(text: str) -> str:
    """Return the delimiter under which most records have as many columns as the header, and more than one."""
    best, best_fit = ",", (0.0, 1)
    for delimiter in DELIMITERS:
        fit = _dialect_fit(text, delimiter)
        if fit[1] > 1 and fit > best_fit:
            best, best_fit = delimiter, fit
    return best


def _dialect_fit(text: str, delimiter: str) -> tuple[float, int]:
    """Return the share of records as wide as the header, and that width in columns."""
    records: list[int] = []
    try:
        for record in islice(csv.reader(StringIO(text, newline=""), delimiter=delimiter), DIALECT_RECORDS):
            if record:
                records.append(len(record))
    except csv.Error:
        pass  # A field over the limit; the records before it have to do.
    if len(records) > 2 and len(records) < DIALECT_RECORDS:
        records.pop()  # The sample may have cut the last one.
    if not records:
        return 0.0, 0
    width = records[0]
    return sum(columns == width for columns in records) / len(records), width
