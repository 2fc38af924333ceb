"""Beside the requests: what ended is announced, and webhook endpoints are told of it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from luthier.api.metrics import ServiceMetrics
from luthier.api.service import Service
from luthier.api.tracing import Tracing
from luthier.records.run import Run
from luthier.records.stored import now
from luthier.records.webhook import WebhookDelivery, WebhookEndpoint
from luthier.serve.webhooks import TIMEOUT_SECONDS, Sender
from luthier.store.store import Store
from luthier.workflows.deliveries import announce_runs, deliver

POLL_SECONDS = 1.0
LEASE_SECONDS = int(4 * TIMEOUT_SECONDS)
AT_MOST_PER_ENDPOINT = 4
ENDING_SECONDS = 2.0

log = logging.getLogger("luthier.webhooks")


class Announcer:
    """Announces ends and tells endpoints, until it is stopped. One slow endpoint does not hold the others up.

    Args:
        store: Whose runs.
        sender: Tells.
        on_end: Called for every run that ended.
        on_attempt: Called after every attempt.
    """

    def __init__(
        self,
        store: Store,
        sender: Sender,
        on_end: Callable[[Run], None] = lambda run: None,
        on_attempt: Callable[[WebhookDelivery], None] = lambda delivery: None,
    ) -> None:
        self._store = store
        self._sender = sender
        self._on_end = on_end
        self._on_attempt = on_attempt
        self._busy: Counter[str] = Counter()
        self._attempts: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Go on until cancelled; attempts under way then get a moment to end."""
        try:
            while True:
                try:
                    await self._round()
                except Exception:  # a database that is busy or a full disk must not end it
                    log.exception("what ended could not be announced; trying again")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            if self._attempts:
                await asyncio.wait(self._attempts, timeout=ENDING_SECONDS)
            for attempt in self._attempts:
                attempt.cancel()

    async def _round(self) -> None:
        for run in await asyncio.to_thread(announce_runs, self._store):
            self._on_end(run)
        claim = self._store.outbox.claim
        due = await asyncio.to_thread(claim, now(), LEASE_SECONDS, dict(self._busy), AT_MOST_PER_ENDPOINT)
        for endpoint, delivery in due:
            self._busy[endpoint.id] += 1
            attempt = asyncio.create_task(self._tell(endpoint, delivery))
            self._attempts.add(attempt)
            attempt.add_done_callback(self._attempts.discard)

    async def _tell(self, endpoint: WebhookEndpoint, delivery: WebhookDelivery) -> None:
        try:
            done = await deliver(self._store, self._sender, endpoint, delivery)
            log.log(
                logging.INFO if done.status == "delivered" else logging.WARNING,
                "webhook",
                extra={
                    "endpoint": endpoint.id,
                    "project": endpoint.project,
                    "event": done.event,
                    "type": done.type,
                    "outcome": done.status,
                    "status": done.status_code,
                    "error": done.error,
                    "attempts": done.attempts,
                },
            )
            self._on_attempt(done)
        except Exception:  # its lease ends, and it is tried again
            log.exception("delivery %s could not be done; it is tried again", delivery.id)
        finally:
            self._busy[endpoint.id] -= 1


@asynccontextmanager
async def announcements(app: FastAPI) -> AsyncIterator[None]:
    """Announce for as long as the application runs."""
    service: Service = app.state.service
    metrics: ServiceMetrics = app.state.metrics
    tracer: Tracing | None = app.state.tracing
    sender = Sender(service.webhook_targets)

    def ended(run: Run) -> None:
        metrics.count_run(run)
        if tracer is not None:
            tracer.trace_run(run)

    task = asyncio.create_task(Announcer(service.store, sender, ended, metrics.count_attempt).run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await sender.close()
