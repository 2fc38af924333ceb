"""What a workflow sees of a run that the server process executes: the run, its project, and a way to ask models."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from luthier.jobs.ending import stopped_on_request
from luthier.records.access import Caller
from luthier.records.run import EventLevel, Run, RunRequest
from luthier.store.store import Store

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
ENGINE_TRIES = 8
CANCEL_AGAIN_SECONDS = 1.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """What a route answered: its status, its JSON body, the id of the request, and when to try again, if it said so."""

    status: int
    body: Any
    request_id: str
    retry_after_seconds: float | None = None


Send = Callable[[Caller, str, str, dict[str, Any] | None], Awaitable[Answer]]


class ResidentContext:
    """A run being executed by a coroutine of the server.

    Its workflow must not block the event loop: what reads, writes or computes for long belongs into a thread.

    Args:
        store: Where the run is.
        run: The run.
        send: Sends (caller, method, path, body) to the service's own routes.
        slots: How many requests all such runs together may have under way.
    """

    def __init__(self, store: Store, run: Run, send: Send, slots: asyncio.Semaphore) -> None:
        self.store = store
        self.run = run
        self.caller = Caller(project=run.project)
        self.request: RunRequest | None = None
        self._send = send
        self._slots = slots
        self._asked = asyncio.Event()
        self.hear(run.request)

    @property
    def folder(self) -> Path:
        """The folder of the run's own files."""
        return self.store.run_folder(self.run.id)

    def hear(self, request: RunRequest | None) -> None:
        """Take what a person asks of the run; whoever executes it calls this."""
        if request is not None:
            self.request = request
            self._asked.set()

    async def say(self, message: str, *, level: EventLevel = "info", data: dict[str, Any] | None = None) -> None:
        """Add a message to the run's events."""
        await asyncio.to_thread(self.store.runs.add_event, self.run.id, message, level=level, data=data)

    async def progress(self, message: str, done: int, total: int) -> None:
        """Say how far the run has come."""
        data = {"done": done, "total": total}
        await asyncio.to_thread(self.store.runs.add_event, self.run.id, message, type="progress", data=data)

    async def ask(self, path: str, body: dict[str, Any] | None = None, *, method: str = "POST") -> Answer:
        """Send a request to the service's own routes in the name of the run's project.

        A service that is busy (429) is asked again, later and later, until it is not; one whose engine fails (503), a
        few times. It never raises for an answer; look at its ``status``.
        """
        tries = failures = 0
        while True:
            async with self._slots:
                answer = await self._send(self.caller, method, path, body)
            tries += 1
            failures += answer.status == 503
            if answer.status not in (429, 503) or failures == ENGINE_TRIES:
                return answer
            await asyncio.sleep(_pause_seconds(answer, tries))

    def stop_if_asked(self) -> None:
        """End the run here where a person asked for it.

        Raises:
            RunStopped: it was asked to pause or cancel.
        """
        if self.request:
            raise stopped_on_request(self.run.id, self.request)

    async def unless_asked(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of ``work``; it is cancelled as soon as a person asks the run to pause or cancel.

        Raises:
            RunStopped: that was the case.
        """
        working, asked = asyncio.create_task(work), asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.stop_if_asked()
            return await working
        finally:
            await end_tasks(asked, working)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they are over: what they hold is free before anybody goes on.

    They are cancelled again where something swallows that, as ``asyncio.wait_for`` may in Python 3.11.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


def _pause_seconds(answer: Answer, tries: int) -> float:
    """Return a time that doubles with every try, at least what the service asked for, and never the same for many."""
    doubled = min(FIRST_PAUSE_SECONDS * 2.0 ** (tries - 1), LONGEST_PAUSE_SECONDS)
    return max(doubled, answer.retry_after_seconds or 0.0) * random.uniform(0.75, 1.25)  # noqa: S311 - not a secret
