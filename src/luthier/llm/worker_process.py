"""A process that runs one model, seen from asyncio: started, asked, cancelled, closed.

The process lives behind a socket pair and speaks JSON lines; what it answers carries the id of the request that it
belongs to. So its libraries never meet those of another model, its crash is an error and not ours, and it ends when
this process ends, however that happens. :mod:`luthier.llm.engine_process` and :mod:`luthier.llm.encoder_process` say
what is asked and what comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from luthier.errors import EngineError
from luthier.llm.process_memory import resident_bytes

READY_DEADLINE_SECONDS = 300.0
CLOSE_DEADLINE_SECONDS = 5.0
MAX_LINE_BYTES = 64 * 2**20
STDERR_TAIL_LINES = 20
Outcome = TypeVar("Outcome")


class WorkerProcess(Generic[Outcome]):
    """A running process. Make it with :meth:`_started`; all calls belong to the event loop that started it.

    Args:
        folder: The model's folder, by whose name errors call the process.
        process: The process.
        reader: Its side of the socket pair, to read.
        writer: The same, to write.
    """

    def __init__(
        self,
        folder: Path,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.folder = folder
        self._process = process
        self._reader = reader
        self._writer = writer
        self._stderr_tail: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
        self._tasks = [asyncio.create_task(self._keep_stderr_tail())]
        self._answers: dict[int, asyncio.Queue[Outcome | EngineError]] = {}
        self._ids = itertools.count()
        self._death: str | None = None

    @classmethod
    async def _started(
        cls, folder: Path, module: str, arguments: Sequence[str], ready_deadline_seconds: float = READY_DEADLINE_SECONDS
    ) -> Self:
        """Start ``python -m <module> --model <folder> --fd <socket> …`` and wait for its line that says "ready".

        Raises:
            EngineError: the process died or was not ready in time; the end of its stderr is among the problems.
        """
        worker = await cls._spawned(folder, module, arguments)
        try:
            await asyncio.wait_for(worker._wait_ready(), ready_deadline_seconds)
        except TimeoutError:
            await worker._kill()
            raise worker._error(f"was not ready within {ready_deadline_seconds:g} seconds") from None
        except BaseException:
            await worker._kill()
            raise
        worker._tasks.append(asyncio.create_task(worker._dispatch()))
        return worker

    @property
    def alive(self) -> bool:
        """Whether the process can take requests."""
        return self._death is None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def in_flight(self) -> int:
        """How many requests are being answered or wait for it."""
        return len(self._answers)

    @property
    def memory_bytes(self) -> int:
        """The resident memory of the process."""
        return resident_bytes(self.pid)

    async def close(self) -> None:
        """End the process: ask, wait a little, kill. Requests in flight raise EngineError. May be called twice."""
        if self._death is None:
            self._fail_all("was closed")
            self._send({"op": "shutdown"})
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), CLOSE_DEADLINE_SECONDS)
        finally:
            await self._kill()

    async def _outcomes(
        self, message: dict[str, Any], is_last: Callable[[Outcome], bool]
    ) -> AsyncGenerator[Outcome, None]:
        """Send a request, and yield what comes of it until the last; closing early cancels it in the process.

        Raises:
            EngineError: the process refused the request, or it died.
        """
        if not self.alive:
            raise self._error(self._death or "has ended")
        request = next(self._ids)
        outcomes = self._answers[request] = asyncio.Queue()
        finished = False
        try:
            self._send(message | {"id": request})
            while not finished:
                outcome = await outcomes.get()
                if isinstance(outcome, EngineError):
                    finished = True
                    raise outcome
                finished = is_last(outcome)
                yield outcome
        finally:
            del self._answers[request]
            if not finished and self.alive:
                self._send({"op": "cancel", "id": request})

    def _receive(self, message: dict[str, Any]) -> None:
        """Hand what a message of the process brings to the requests that it belongs to, with :meth:`_hand`."""
        raise NotImplementedError

    def _hand(self, request: int, outcome: Outcome | EngineError) -> None:
        if request in self._answers:
            self._answers[request].put_nowait(outcome)

    @classmethod
    async def _spawned(cls, folder: Path, module: str, arguments: Sequence[str]) -> Self:
        """Start the process; its connection is there before, so that nothing can be cancelled once it runs."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", module, "--model", str(folder), "--fd", str(theirs.fileno()), *arguments]
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE_BYTES)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                )
            except BaseException:
                writer.close()
                raise
        return cls(folder, process, reader, writer)

    async def _wait_ready(self) -> None:
        line = await self._reader.readline()
        if not line:
            await self._process.wait()
            await self._tasks[0]  # all of stderr is read
            raise self._error(f"died while loading ({_exit_text(self._process.returncode)})")

    async def _dispatch(self) -> None:
        """Hand every message of the process on, until the process is gone."""
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                message = json.loads(line)
                if message["op"] == "error":
                    self._hand(message["id"], EngineError(message["message"]))
                else:
                    self._receive(message)
        if self._death is None:
            await self._process.wait()
            self._fail_all(f"died ({_exit_text(self._process.returncode)})")

    def _fail_all(self, death: str) -> None:
        self._death = death
        for outcomes in self._answers.values():
            outcomes.put_nowait(self._error(death))

    def _send(self, message: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _error(self, what: str) -> EngineError:
        return EngineError(f"The engine of {self.folder.name} {what}.", problems=list(self._stderr_tail))

    async def _keep_stderr_tail(self) -> None:
        assert self._process.stderr is not None  # noqa: S101 - it was started with a pipe
        while chunk := await self._process.stderr.read(2**16):
            self._stderr_tail.extend(chunk.decode("utf-8", "replace").splitlines())

    async def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        self._writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _exit_text(returncode: int | None) -> str:
    return f"signal {-returncode}" if returncode is not None and returncode < 0 else f"exit status {returncode}"
