"""Answers of a batch are on disk before they count; what a kill left half written is cut off."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from luthier.workflows import batch_spool
from luthier.workflows.batch_spool import AnswerSpool, Row


def row(custom_id: str, status: int = 200) -> Row:
    return {"custom_id": custom_id, "response": {"status_code": status, "body": {"text": "Grüße\u2028"}}}


def keep(spool: AnswerSpool, *rows: tuple[int, Row]) -> None:
    async def all_at_once() -> None:
        await asyncio.gather(*(spool.keep(line, one) for line, one in rows))

    asyncio.run(all_at_once())


def test_answers_are_found_again_by_their_line(tmp_path: Path) -> None:
    spool = AnswerSpool(tmp_path / "answers")
    keep(spool, *((line, row(f"line-{line}", 200 if line % 2 else 400)) for line in range(50, 0, -1)))
    spool.close()
    again = AnswerSpool(tmp_path / "answers")
    assert 7 in again
    assert 51 not in again
    text, succeeded = again.get(7)
    assert text.endswith(b"\n")
    assert '"line-7"' in text.decode()
    assert (succeeded, again.get(8)[1]) == (True, False)
    assert sorted(one["custom_id"] for one in again.rows()) == sorted(f"line-{line}" for line in range(1, 51))
    again.close()


@pytest.mark.parametrize("rest", [b"3", b"3\t", b'3\t{"custom_id"', b'3\t{"custom_id": "c"}', b"\0" * 100])
def test_what_a_kill_left_half_written_is_cut_off_and_written_again(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "answers"
    spool = AnswerSpool(path)
    keep(spool, (1, row("a")), (2, row("b")))
    spool.close()
    path.write_bytes(path.read_bytes() + rest)
    spool = AnswerSpool(path)
    assert 3 not in spool
    keep(spool, (3, row("c")))
    spool.close()
    assert [one["custom_id"] for one in AnswerSpool(path).rows()] == ["a", "b", "c"]


def test_of_two_answers_to_one_request_the_first_counts(tmp_path: Path) -> None:
    spool = AnswerSpool(tmp_path / "answers")
    keep(spool, (1, row("first")))
    keep(spool, (1, row("second")), (2, row("other")))
    assert [one["custom_id"] for one in spool.rows()] == ["first", "other"]
    spool.close()
    assert [one["custom_id"] for one in AnswerSpool(tmp_path / "answers").rows()] == ["first", "other"]


def test_an_answer_whose_keeper_is_cancelled_while_it_is_written_is_there_once_all_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write = os.write

    def write_later(descriptor: int, data: memoryview) -> int:
        begun.set()
        assert go_on.wait(60)
        return write(descriptor, data)

    async def cancel_one() -> None:
        keeping = asyncio.create_task(spool.keep(1, row("a")))
        await asyncio.to_thread(begun.wait, 60)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        assert (keeping.cancelled(), len(spool)) == (True, 0)
        go_on.set()
        await spool.settle()

    spool = AnswerSpool(tmp_path / "answers")
    monkeypatch.setattr(batch_spool.os, "write", write_later)
    asyncio.run(cancel_one())
    assert [one["custom_id"] for one in spool.rows()] == ["a"]
    assert len(spool) == 1
    spool.close()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = AnswerSpool(tmp_path / "answers")
    keep(spool, (1, row("a")))

    def write_half(descriptor: int, data: memoryview) -> int:
        with (tmp_path / "answers").open("ab") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch_spool.os, "write", write_half)
    with pytest.raises(OSError, match="No space"):
        keep(spool, (2, row("b")))
    monkeypatch.undo()
    keep(spool, (2, row("b")))
    spool.close()
    assert [one["custom_id"] for one in AnswerSpool(tmp_path / "answers").rows()] == ["a", "b"]
