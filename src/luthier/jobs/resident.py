"""Executes runs inside the server process, because that has the models loaded: batches, and runs of evals.

A run is taken from the queue under a lease that is renewed, as a worker process does (:mod:`luthier.jobs.worker`), and
is executed by a coroutine. When the server ends, its runs go back into the queue; when it is killed, the lease ends or
the owner is seen to be dead, and the next server goes on from what the run has kept in its folder.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

from luthier.errors import ConflictError, LuthierError
from luthier.jobs.ending import end_with_error
from luthier.jobs.launch import log_path
from luthier.jobs.resident_context import ResidentContext, Send, end_tasks
from luthier.jobs.worker import LEASE_SECONDS, is_dead, this_owner
from luthier.records.run import Run, RunKind
from luthier.store.artifacts import full_disk_is_an_error
from luthier.store.store import Store

POLL_SECONDS = 0.25
RENEW_SECONDS = 0.5
MAX_ATTEMPTS = 10  # a server may die of many things beside this run
ENDING_ATTEMPTS = 3  # after these: to put in order what the run has
REQUESTS_AT_ONCE = 32  # enough to fill an engine's batch; all runs share them, so that other clients get their turn
Executor = Callable[[ResidentContext], Awaitable[dict[str, Any]]]
Ending = Callable[[ResidentContext], Awaitable[None]]

log = logging.getLogger("luthier.jobs")


class Residents:
    """The runs that this process executes. Everything belongs to one event loop.

    Args:
        store: Whose queue.
        executors: What executes each kind of run. A killed run is executed again, from what it kept in its folder.
        send: Sends (caller, method, path, body) to the service's own routes.
        endings: What puts in order what a run has before it fails because its servers died too often, by kind.
        at_once: How many runs are executed at once; those that are to be cancelled come on top.
        requests_at_once: How many requests all of them together may have under way.
    """

    def __init__(
        self,
        store: Store,
        executors: Mapping[RunKind, Executor],
        send: Send,
        *,
        endings: Mapping[RunKind, Ending] | None = None,
        at_once: int = 4,
        requests_at_once: int = REQUESTS_AT_ONCE,
    ) -> None:
        self._store = store
        self._executors = executors
        self._endings = endings or {}
        self._send = send
        self._at_once = at_once
        self._slots = asyncio.Semaphore(requests_at_once)
        self._owner = this_owner()
        self._works: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._holds: dict[str, asyncio.Task[None]] = {}
        self._leaving = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take runs."""
        self._watching = asyncio.create_task(self._watch())

    @property
    def alive(self) -> bool:
        """Whether the queue is watched."""
        return self._watching is not None and not self._watching.done()

    @property
    def held(self) -> frozenset[str]:
        """The ids of the runs that are executed here now."""
        return frozenset(self._holds)

    async def stop(self) -> None:
        """Stop taking runs, and put those under way back into the queue."""
        self._leaving.set()
        if self._watching is not None:
            await self._watching
        await end_tasks(*self._works.values())
        await asyncio.gather(*self._holds.values(), return_exceptions=True)

    async def _watch(self) -> None:
        while not self._leaving.is_set():
            try:
                await self._fill()
            except Exception:  # a database that is busy or a full disk must not end the watch
                log.exception("the queue could not be watched; trying again")
            try:
                await asyncio.wait_for(self._leaving.wait(), POLL_SECONDS)
            except TimeoutError:
                continue

    async def _fill(self) -> None:
        room = max(0, self._at_once - len(self._holds))
        for run in await asyncio.to_thread(self._claim, room, self.held):
            context = ResidentContext(self._store, run, self._send, self._slots)
            work = self._works[run.id] = asyncio.create_task(self._execute(context))
            self._holds[run.id] = asyncio.create_task(self._hold(context, work))

    def _claim(self, room: int, held: frozenset[str]) -> list[Run]:
        """Take the oldest runs that wait, and all that are to be cancelled, which are over at once.

        One that is executed here and whose lease has ended is not taken twice.
        """
        most = MAX_ATTEMPTS + ENDING_ATTEMPTS
        taken: list[Run] = []
        for run in self._store.runs.waiting(tuple(self._executors), is_dead, to_cancel=not room):
            if run.id not in held and (len(taken) < room or run.request == "cancel"):
                claimed = self._store.runs.claim(self._owner, LEASE_SECONDS, is_dead, run.id, max_attempts=most)
                taken += [claimed] if claimed else []
        return taken

    async def _execute(self, context: ResidentContext) -> dict[str, Any]:
        run = context.run
        with full_disk_is_an_error(self._store.home):
            if run.attempts > MAX_ATTEMPTS:
                await self._give_up(context)
            if run.attempts > 1:
                message = f"The server before this one ended early; attempt {run.attempts} goes on from what is done."
                await context.say(message, level="warning")
            return await self._executors[run.kind](context)

    async def _give_up(self, context: ResidentContext) -> NoReturn:
        """End a run whose servers died too often, after what its kind does at such an end.

        Raises:
            RunStopped: it was asked to pause or cancel before.
            LuthierError: otherwise.
        """
        if context.run.kind in self._endings:
            await self._endings[context.run.kind](context)
        context.stop_if_asked()
        raise LuthierError(f"The server that executed it died {MAX_ATTEMPTS} times.")

    async def _hold(self, context: ResidentContext, work: asyncio.Task[dict[str, Any]]) -> None:
        """Keep the lease of a run while it is executed, and then write how it ended."""
        run = context.run
        renewing = asyncio.create_task(self._renew(context, work))
        try:
            await asyncio.wait((work,))
            renewing.cancel()
            await asyncio.to_thread(self._end, context, work)
        except Exception:  # the lease ends, and the run is taken up again
            log.exception("the end of run %s could not be written", run.id)
        finally:
            renewing.cancel()
            del self._works[run.id], self._holds[run.id]

    def _end(self, context: ResidentContext, work: asyncio.Task[dict[str, Any]]) -> None:
        run = context.run
        if work.cancelled():
            if self._leaving.is_set():
                self._store.runs.hand_back(run.id, self._owner)
            return  # else the run has another owner by now
        error = work.exception()
        if error is None:
            self._store.runs.finish(run.id, self._owner, "succeeded", result=work.result())
        elif isinstance(error, Exception):
            if not isinstance(error, LuthierError):
                with log_path(self._store, run.id).open("a") as file:
                    traceback.print_exception(error, file=file)
            end_with_error(self._store, run, self._owner, error, context.request)

    async def _renew(self, context: ResidentContext, work: asyncio.Task[dict[str, Any]]) -> None:
        run = context.run
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                context.hear(await asyncio.to_thread(self._store.runs.renew, run.id, self._owner, LEASE_SECONDS))
            except ConflictError:
                log.error("run %s was taken over by another process; leaving it", run.id)
                work.cancel()
                return
            except Exception:  # ending here would lose the lease while the run goes on
                log.exception("the lease of run %s could not be renewed; trying again", run.id)
