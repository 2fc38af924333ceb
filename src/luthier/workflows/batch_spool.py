"""What a batch has so far: its answers in the order in which they came, each on disk before it counts.

A line of the file is the number of a request's line, a tabulator, and the answer as JSON. What a kill left half
written is cut off when the file is opened again.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

Row = dict[str, Any]


class _Place(NamedTuple):
    start: int
    length: int
    succeeded: bool


class AnswerSpool:
    """The answers of one batch.

    Memory: some hundred bytes an answer. :meth:`keep` belongs to an event loop, all else to any thread.
    """

    def __init__(self, path: Path) -> None:
        self._places: dict[int, _Place] = {}
        self._end = 0
        self._pending: list[tuple[int, Row]] = []
        self._turn = asyncio.Lock()
        self._under_way: asyncio.Task[None] | None = None
        self._writing = threading.Lock()
        if path.exists():
            with path.open("rb") as file:
                for line, row in _whole_lines(file):
                    self._add(line, row)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.truncate(self._descriptor, self._end)

    def __len__(self) -> int:
        """How many requests have their answer."""
        return len(self._places)

    def __contains__(self, line: int) -> bool:
        """Whether the request of a line has its answer."""
        return line in self._places

    async def keep(self, line: int, row: Row) -> None:
        """Keep an answer; once this returns, it is there after any kill. Answers that come together share a write."""
        self._pending.append((line, row))
        async with self._turn:
            await self.settle()
            rows, self._pending = self._pending, []
            if rows:
                self._under_way = asyncio.create_task(asyncio.to_thread(self._write, rows))
                await asyncio.shield(self._under_way)

    async def settle(self) -> None:
        """Wait until nothing is being written; a thread may still be at it when a :meth:`keep` was cancelled."""
        if self._under_way is not None and not self._under_way.done():
            await asyncio.wait((self._under_way,))

    def get(self, line: int) -> tuple[bytes, bool]:
        """Return the answer to a line's request as a line of JSON, and whether the request succeeded."""
        place = self._places[line]
        return os.pread(self._descriptor, place.length, place.start), place.succeeded

    def rows(self) -> Iterator[Row]:
        """Yield all answers in the order in which they came."""
        for line in self._places:
            yield json.loads(self.get(line)[0])

    def close(self) -> None:
        """Close the file, after what is being written."""
        with self._writing:
            os.close(self._descriptor)

    def _add(self, line: int, text: bytes) -> None:
        """Note where an answer lies; of two to one request, the first counts."""
        start = self._end + len(b"%d\t" % line)
        self._places.setdefault(line, _Place(start, len(text), succeeded(json.loads(text))))
        self._end = start + len(text)

    def _write(self, rows: list[tuple[int, Row]]) -> None:
        texts = [(line, json.dumps(row, ensure_ascii=False).encode() + b"\n") for line, row in rows]
        whole = memoryview(b"".join(b"%d\t%b" % pair for pair in texts))
        with self._writing:
            try:
                while whole:
                    whole = whole[os.write(self._descriptor, whole) :]
                os.fsync(self._descriptor)
            except OSError:
                os.truncate(self._descriptor, self._end)
                raise
            for line, text in texts:
                self._add(line, text)


def _whole_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (line, answer) up to the first that is not whole."""
    for text in file:
        number, _, row = text.partition(b"\t")
        try:
            json.loads(row)
        except ValueError:
            return
        if not row.endswith(b"\n"):
            return
        yield int(number), row


def succeeded(row: Row) -> bool:
    """Whether an answer is one that was asked for, and not an error."""
    response = row["response"]
    return response is not None and 200 <= response["status_code"] < 300
