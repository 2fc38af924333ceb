"""One model in a process of its own, seen from asyncio: start it, ask it for tokens, cancel, close.

The engine (:mod:`luthier.llm.engine.openvino_worker`) lives behind a socket pair. So its libraries never meet torch
in one process, its crash is an error and not ours, and it ends when this process ends, however that happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import sys
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.errors import EngineError, NotFoundError
from luthier.llm.engine_interface import TokenDelta
from luthier.llm.process_memory import resident_bytes
from luthier.records.completion import Sampling

WORKER_MODULE = "luthier.llm.engine.openvino_worker"
READY_DEADLINE_SECONDS = 300.0
CLOSE_DEADLINE_SECONDS = 5.0
MAX_LINE_BYTES = 64 * 2**20
STDERR_TAIL_LINES = 20


@dataclass(frozen=True)
class EngineOptions:
    """How to run an engine.

    ``cache_gigabytes`` bounds the key-value cache. ``threads`` 0 lets the engine choose. ``precision`` is that of the
    arithmetic: "auto" is float32 for quantised weights and else the processor's own (bfloat16 where it has it).
    """

    cache_gigabytes: int = 2
    threads: int = 0
    precision: Literal["auto", "native", "float32"] = "auto"


Outcome = TokenDelta | EngineError


@dataclass
class EngineProcess:
    """A running engine. Make it with :meth:`start`; all calls belong to the event loop that started it."""

    folder: Path
    _process: asyncio.subprocess.Process
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _stderr_tail: deque[str]
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _answers: dict[int, asyncio.Queue[Outcome]] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _death: str | None = None
    _generated_tokens: int = 0

    @classmethod
    async def start(
        cls,
        folder: Path,
        options: EngineOptions | None = None,
        ready_deadline_seconds: float = READY_DEADLINE_SECONDS,
    ) -> EngineProcess:
        """Start an engine on the ``model.gguf`` of a served model folder and wait until it is ready.

        Raises:
            NotFoundError: the folder has no ``model.gguf``.
            EngineError: the engine died or was not ready in time; the end of its stderr is among the problems.
        """
        if not (folder / "model.gguf").is_file():
            raise NotFoundError(f"{folder} has no model.gguf, which an engine needs.")
        engine = await _spawn(folder, options or EngineOptions())
        try:
            await asyncio.wait_for(engine._wait_ready(), ready_deadline_seconds)
        except TimeoutError:
            await engine._kill()
            raise engine._error(f"was not ready within {ready_deadline_seconds:g} seconds") from None
        except BaseException:
            await engine._kill()
            raise
        engine._tasks.append(asyncio.create_task(engine._dispatch()))
        return engine

    @property
    def alive(self) -> bool:
        """Whether the engine can take requests."""
        return self._death is None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    @property
    def in_flight(self) -> int:
        """How many answers are being generated or waited for."""
        return len(self._answers)

    @property
    def generated_tokens(self) -> int:
        """How many tokens the engine has made so far, those of cancelled answers too."""
        return self._generated_tokens

    @property
    def memory_bytes(self) -> int:
        """The resident memory of the engine's process."""
        return resident_bytes(self.pid)

    async def generate(
        self, prompt_tokens: Sequence[int], sampling: Sampling, stop_tokens: Sequence[int]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Yield an answer's tokens as they come; the last delta has a finish reason.

        Closing the iterator early, or cancelling the task that reads it, cancels the answer in the engine at once.
        ``sampling.stop`` is not looked at: strings are the business of :mod:`luthier.llm.answer_stream`.

        Raises:
            EngineError: the engine refused the prompt, or it died.
        """
        if not self.alive:
            raise self._error(self._death or "has ended")
        request = next(self._ids)
        outcomes = self._answers[request] = asyncio.Queue()
        finished = False
        try:
            self._send(_generate_message(request, prompt_tokens, sampling, stop_tokens))
            while not finished:
                outcome = await outcomes.get()
                finished = isinstance(outcome, EngineError) or outcome.finish_reason is not None
                if isinstance(outcome, EngineError):
                    raise outcome
                yield outcome
        finally:
            del self._answers[request]
            if not finished and self.alive:
                self._send({"op": "cancel", "id": request})

    async def close(self) -> None:
        """End the engine: ask, wait a little, kill. Answers still in flight raise EngineError. May be called twice."""
        if self._death is None:
            self._fail_all("was closed")
            self._send({"op": "shutdown"})
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), CLOSE_DEADLINE_SECONDS)
        finally:
            await self._kill()

    async def _wait_ready(self) -> None:
        line = await self._reader.readline()
        if not line:
            await self._process.wait()
            await self._tasks[0]  # all of stderr is read
            raise self._error(f"died while loading ({_exit_text(self._process.returncode)})")

    async def _dispatch(self) -> None:
        """Hand every message of the engine to the answer it belongs to, until the engine is gone."""
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                self._deliver(json.loads(line))
        if self._death is None:
            await self._process.wait()
            self._fail_all(f"died ({_exit_text(self._process.returncode)})")

    def _deliver(self, message: dict[str, Any]) -> None:
        if message["op"] == "error" and message["id"] in self._answers:
            self._answers[message["id"]].put_nowait(EngineError(message["message"]))
        for request, tokens, logprobs, finish_reason in message.get("deltas", ()):
            self._generated_tokens += len(tokens)
            if request in self._answers:
                self._answers[request].put_nowait(TokenDelta(tuple(tokens), tuple(logprobs), finish_reason))

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


async def _spawn(folder: Path, options: EngineOptions) -> EngineProcess:
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *_command(folder, options, theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE_BYTES)
    engine = EngineProcess(folder, process, reader, writer, deque(maxlen=STDERR_TAIL_LINES))
    engine._tasks.append(asyncio.create_task(engine._keep_stderr_tail()))
    return engine


def _command(folder: Path, options: EngineOptions, descriptor: int) -> list[str]:
    command = [sys.executable, "-m", WORKER_MODULE, "--model", str(folder), "--fd", str(descriptor)]
    command += ["--cache-gigabytes", str(options.cache_gigabytes), "--threads", str(options.threads)]
    return [*command, "--precision", options.precision]


def _generate_message(
    request: int, prompt_tokens: Sequence[int], sampling: Sampling, stop_tokens: Sequence[int]
) -> dict[str, Any]:
    return {
        "op": "generate",
        "id": request,
        "tokens": list(prompt_tokens),
        "sampling": sampling.model_dump(exclude={"stop"}),
        "stop_tokens": list(stop_tokens),
    }


def _exit_text(returncode: int | None) -> str:
    return f"signal {-returncode}" if returncode is not None and returncode < 0 else f"exit status {returncode}"
