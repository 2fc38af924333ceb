"""Examples on disk are the examples that were written, and memory does not grow with them."""

from __future__ import annotations

import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.errors import InputError
from luthier.templates.renderer import TokenizedExample
from luthier.templates.spool import Joined, SpooledExamples


def examples(count: int, length: int = 5) -> Iterator[TokenizedExample]:
    for index in range(count):
        size = 2 + index % length
        tokens = [(index * 31 + place) % 60_000 for place in range(size)]
        yield TokenizedExample(f"döc {index}#1", tokens, [False] + [True] * (size - 1), 0.5 + index % 3)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = list(examples(50))
    spooled = SpooledExamples.write(tmp_path, iter(written))
    assert list(spooled) == written
    assert spooled[7] == written[7]
    assert spooled[-1] == written[-1]
    assert spooled[3:9] == written[3:9]
    assert len(SpooledExamples(tmp_path)) == 50


def test_sequences_that_are_joined_are_read_as_one(tmp_path: Path) -> None:
    written = list(examples(12))
    joined = Joined(SpooledExamples.write(tmp_path, written[:5]), [], written[5:11], written[11:], [])
    assert list(joined) == written
    assert [joined[place] for place in range(12)] == written
    assert joined[-2] == written[-2]
    assert joined[3:9] == written[3:9]
    with pytest.raises(IndexError):
        joined[12]


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    tokens = list(range(2_000))
    mask = [False] + [True] * 1_999
    tracemalloc.start()
    spooled = SpooledExamples.write(tmp_path, (TokenizedExample(str(i), tokens, mask) for i in range(200)))
    total = sum(len(example.tokens) for example in spooled)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 400_000
    assert peak < total  # less than a byte a token; lists of them take eight and more


def test_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No example"):
        SpooledExamples.write(tmp_path, iter(()))


def test_a_disk_without_room_is_an_error_also_for_short_examples(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, before[1]))  # Python gets an error in the place of a signal
    try:
        with pytest.raises(OSError, match="too large"):
            SpooledExamples.write(tmp_path, examples(1_000, length=9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
