"""Run a grader's Python code in a process that can do nothing but compute.

``Sandbox.grade`` takes source, sample and item and gives the score. Before the first one, a probe tries what must not
be possible; where any of it is, or where the process cannot be confined, nothing is run at all.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import sysconfig
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from luthier.errors import LuthierError, MissingDependencyError
from luthier.evaluate.sandbox.confinement import Walls

SOURCE_ROOT = Path(__file__).parents[3]
# The package is imported from where it lies; then its folder is out of reach, and off the path.
PROGRAM = f"import sys; sys.path[:0] = [{str(SOURCE_ROOT)!r}]; from luthier.evaluate.sandbox.inside import main; main()"
LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
SMALL_THINGS = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
LOOK_SECONDS = 0.05
READ_BYTES = 2**16
OnExcess = Callable[[str], None]
HINT = "python graders need Linux 5.13 or newer with Landlock and seccomp, and the library libseccomp2"
PROBE = """
import os, socket

def refused(attempt):
    try:
        attempt()
    except OSError:
        return True
    return False

def grade(sample, item):
    attempts = [
        lambda: open(item["canary"]),
        lambda: open(item["canary"], "a"),
        lambda: os.listdir("/"),
        lambda: open("/proc/self/environ"),
        lambda: socket.socket(),
        lambda: socket.socket(socket.AF_UNIX),
        lambda: os.kill(item["parent"], 0),
        lambda: os.fork() or os._exit(0),
        lambda: os.execv("/bin/true", ["true"]),
    ]
    return sum(map(refused, attempts)) / len(attempts)
"""


@dataclass(frozen=True)
class Allowance:
    """What one piece of code may use."""

    seconds: float = 30.0
    memory_bytes: int = 2 * 2**30
    file_bytes: int = 8 * 2**20
    folder_bytes: int = 64 * 2**20
    files: int = 256
    open_files: int = 64
    output_bytes: int = 2**16


class CodeError(LuthierError):
    """The code gave no score: it raised, returned something else, or used more than it may.

    ``kind`` is ``source`` (it does not define a grader), ``runtime``, ``result`` (no number) or ``limit``.
    """

    def __init__(self, kind: Literal["source", "runtime", "result", "limit"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Sandbox:
    """Processes that compute, a few at a time.

    Args:
        allowance: What each may use.
        at_once: How many run at once, for an event loop.
    """

    def __init__(self, allowance: Allowance = Allowance(), at_once: int = 2) -> None:
        self.allowance = allowance
        self._at_once = at_once
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._proven = False

    async def grade(self, source: str, sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
        """Return what the source's ``grade(sample, item)`` returns.

        Raises:
            CodeError: it returns no number, or does not return.
            MissingDependencyError: there is no sandbox on this machine.
        """
        await self._prove()
        return await self._run({"source": source, "sample": sample, "item": item, "check_only": False})

    async def check(self, source: str) -> None:
        """Run the source without grading anything.

        Raises:
            CodeError: it fails, or defines no ``grade``.
            MissingDependencyError: there is no sandbox on this machine.
        """
        await self._prove()
        await self._run({"source": source, "sample": {}, "item": {}, "check_only": True})

    async def _prove(self) -> None:
        """Find out, once, whether the walls hold."""
        if self._proven:
            return
        if sys.platform != "linux":
            raise MissingDependencyError(f"There is no sandbox for Python code on {sys.platform}.", hint=HINT)
        with tempfile.NamedTemporaryFile(prefix="luthier-canary-") as canary:
            item = {"canary": canary.name, "parent": os.getpid()}
            try:
                refused = await self._run({"source": PROBE, "sample": {}, "item": item, "check_only": False})
            except CodeError as error:
                raise MissingDependencyError(
                    f"The sandbox for Python code does not work: {error}", hint=HINT
                ) from error
        if refused != 1.0:
            raise MissingDependencyError("The sandbox for Python code does not hold on this machine.", hint=HINT)
        self._proven = True

    async def _run(self, task: Mapping[str, Any]) -> float:
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._at_once))
        payload = json.dumps(task).encode()
        async with slots:
            with tempfile.TemporaryDirectory(prefix="luthier-sandbox-", ignore_cleanup_errors=True) as folder:
                async with self._process(folder) as process:
                    answer, output = await self._within_bounds(process, payload, Path(folder))
        return _score(answer, output, process.returncode or 0)

    @asynccontextmanager
    async def _process(self, folder: str) -> AsyncIterator[Process]:
        """Start the process; whatever happens, it is gone at the end."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", "-c", PROGRAM, json.dumps(self._setup(folder))),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=folder,
            env=ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()  # what is left in its pipes, so that they are closed

    def _setup(self, folder: str) -> dict[str, Any]:
        allowance = self.allowance
        packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
        standard += [path for path in sys.path if Path(path).name == "lib-dynload"]
        libraries = [*LIBRARY_FOLDERS, str(Path(sys.base_prefix) / "lib"), *SMALL_THINGS]
        walls = Walls(
            readable=[*standard, *packages, *libraries],
            writable=[folder, os.devnull],
            memory_bytes=allowance.memory_bytes,
            cpu_seconds=int(allowance.seconds) + 1,
            file_bytes=allowance.file_bytes,
            open_files=allowance.open_files,
        )
        return {"parent": os.getpid(), "walls": asdict(walls), "path": [*standard, *packages]}

    async def _within_bounds(self, process: Process, payload: bytes, folder: Path) -> tuple[bytes, bytes]:
        """Return what the process answers and prints; it has ended then.

        Raises:
            CodeError: it takes too long, prints too much or writes too much.
        """
        excesses: list[str] = []

        def end(excess: str) -> None:
            excesses.append(excess)
            with suppress(ProcessLookupError):
                process.kill()

        seconds = self.allowance.seconds
        timer = asyncio.get_running_loop().call_later(seconds, end, f"took longer than {seconds:g} seconds")
        watching = asyncio.create_task(self._watch(folder, end))
        try:
            answer, output = await self._talk(process, payload, end)
        finally:
            timer.cancel()
            watching.cancel()
        if excesses:
            raise CodeError("limit", f"The code {excesses[0]}.")
        return answer, output

    async def _talk(self, process: Process, payload: bytes, end: OnExcess) -> tuple[bytes, bytes]:
        assert process.stdin is not None  # noqa: S101 - it is a pipe, as the others
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        with suppress(BrokenPipeError, ConnectionResetError):  # it may end before it has read everything
            process.stdin.write(payload)
            await process.stdin.drain()
            process.stdin.close()
        answer, output = await asyncio.gather(self._read(process.stdout, end), self._read(process.stderr, end))
        await process.wait()
        return answer, output

    async def _read(self, stream: asyncio.StreamReader, end: OnExcess) -> bytes:
        content = b""
        while piece := await stream.read(READ_BYTES):
            content = (content + piece)[: self.allowance.output_bytes + 1]
            if len(content) > self.allowance.output_bytes:
                end(f"printed more than {self.allowance.output_bytes} bytes")
        return content

    async def _watch(self, folder: Path, end: OnExcess) -> None:
        files, size = self.allowance.files, self.allowance.folder_bytes
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                sizes = _sizes(folder)
            except OSError as error:
                end(f"could not be watched ({error})")
                return
            if len(sizes) > files or sum(sizes) > size:
                end(f"wrote more than {files} files or {size} bytes to its folder")


def _sizes(folder: Path) -> list[int]:
    """Return the sizes of the files of a folder, which has no folders."""
    sizes = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                sizes.append(entry.stat(follow_symlinks=False).st_size)
    return sizes


def _score(answer: bytes, output: bytes, status: int) -> float:
    try:
        parsed = json.loads(answer)
        if "error" not in parsed and math.isfinite(score := float(parsed["score"])):
            return score
        kind, message = parsed["error"], str(parsed["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        how = f"by the signal {signal.Signals(-status).name}" if status < 0 else f"with the status {status}"
        end = output[-500:].decode(errors="replace").strip()
        raise CodeError("runtime", f"The code's process ended {how} without an answer. {end}".strip()) from None
    if kind == "unavailable":
        raise MissingDependencyError(f"Python code cannot be confined here: {message}.", hint=HINT)
    raise CodeError(kind if kind in ("source", "result") else "runtime", message)
