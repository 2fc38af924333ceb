"""A model server that we started: a command with a free port, guarded, and ended with us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import socket
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.errors import EngineError
from luthier.llm.process_memory import family_resident_bytes

GUARD_MODULE = "luthier.llm.server_guard"
OUTPUT_TAIL_LINES = 20
CLOSE_DEADLINE_SECONDS = 15.0
RUN_TIME_ADAPTERS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@dataclass
class ServerProcess:
    """A running server. Make it with :meth:`start`."""

    url: str
    _process: asyncio.subprocess.Process
    _tail: deque[str]
    _reading: asyncio.Task[None]

    @classmethod
    async def start(cls, template: str, values: Mapping[str, str]) -> ServerProcess:
        """Start a command in which ``{port}`` and the names in ``values`` are replaced.

        Raises:
            EngineError: the command cannot be run.
        """
        port = str(_free_port())
        command = [_filled(word, {**values, "port": port}) for word in shlex.split(template)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            GUARD_MODULE,
            *command,
            stdin=pipe,
            stdout=pipe,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **RUN_TIME_ADAPTERS},
        )
        tail: deque[str] = deque(maxlen=OUTPUT_TAIL_LINES)
        return cls(f"http://127.0.0.1:{port}", process, tail, asyncio.create_task(_keep_tail(process, tail)))

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process.returncode is None

    @property
    def memory_bytes(self) -> int:
        """The resident memory of the server and all that it started."""
        return family_resident_bytes(self._process.pid)

    async def died(self) -> EngineError:
        """Wait until the server has ended, and return what it said at the end."""
        status = await self._process.wait()
        await self._reading
        return EngineError(f"The model server ended (exit status {status}).", problems=list(self._tail))

    async def close(self) -> None:
        """End the server and all that it started."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # the guard ends the server
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), CLOSE_DEADLINE_SECONDS)
        finally:
            if self.alive:
                self._process.kill()
                await self._process.wait()
            self._reading.cancel()


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _keep_tail(process: asyncio.subprocess.Process, tail: deque[str]) -> None:
    assert process.stdout is not None  # noqa: S101 - it was started with a pipe
    while chunk := await process.stdout.read(2**16):
        tail.extend(chunk.decode("utf-8", "replace").splitlines())
