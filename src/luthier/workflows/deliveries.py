"""What ended is announced to a project's webhook endpoints, and each is told until it answers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress

from luthier.errors import LuthierError, NotFoundError
from luthier.records.run import Run, RunKind
from luthier.records.stored import new_id, now
from luthier.records.webhook import EventType, WebhookDelivery, WebhookEndpoint
from luthier.serve.webhooks import MAX_ATTEMPTS, Attempt, Sender, delay_seconds, signed_headers
from luthier.store.outbox import Ended
from luthier.store.store import Store
from luthier.workflows.batches import batch_id, batch_object
from luthier.workflows.fine_tuning import job_id
from luthier.workflows.webhooks import signing_secrets

log = logging.getLogger("luthier.webhooks")
GONE = 410
KEEP_SECONDS = 30 * 24 * 3600
# How the end of a run is called at OpenAI, and the id of what ended. Kinds that OpenAI does not know are not told of.
EventOf = Callable[[Store, Run], tuple[EventType, str]]
JOB_EVENTS: dict[str, EventType] = {
    "succeeded": "fine_tuning.job.succeeded",
    "failed": "fine_tuning.job.failed",
    "cancelled": "fine_tuning.job.cancelled",
}
BATCH_EVENTS: dict[str, EventType] = {
    "completed": "batch.completed",
    "failed": "batch.failed",
    "expired": "batch.expired",
    "cancelled": "batch.cancelled",
}
EVAL_EVENTS: dict[str, EventType] = {
    "succeeded": "eval.run.succeeded",
    "failed": "eval.run.failed",
    "cancelled": "eval.run.canceled",
}
EVENTS: dict[RunKind, EventOf] = {
    "train": lambda _, run: (JOB_EVENTS[run.status], job_id(run.id)),
    "eval_run": lambda _, run: (EVAL_EVENTS[run.status], run.id),
    "batch": lambda store, run: (BATCH_EVENTS[batch_object(store, run)["status"]], batch_id(run.id)),
}


def announce_runs(store: Store) -> list[Run]:
    """Keep a delivery for every endpoint that wants to know of a run which has ended, and return these runs.

    Every end is announced once, by whichever process comes first.
    """
    announced = []
    for ended in store.outbox.unannounced():
        try:
            run = store.runs.get(ended.run_id)
        except NotFoundError:  # deleted meanwhile
            continue
        type, subject = _event_of(store, run)
        if store.outbox.announce(ended, type, _new_delivery(ended, type, subject)):
            announced.append(run)
    return announced


def expire_deliveries(store: Store) -> None:
    """Forget deliveries of which nobody wants to know any more; the service calls this from time to time."""
    for delivery in store.outbox.deliveries.expired(now()):
        with suppress(NotFoundError):
            store.outbox.deliveries.remove(delivery.project, delivery.id)


async def deliver(
    store: Store, sender: Sender, endpoint: WebhookEndpoint, delivery: WebhookDelivery
) -> WebhookDelivery:
    """Tell an endpoint once, and keep what came of it.

    An endpoint that answers 410 is disabled. Others are told again later, until it is given up.
    """
    if endpoint.disabled is not None:
        attempt = Attempt(error="the endpoint is disabled")
    else:
        body = event_body(delivery.event, delivery.created_at, delivery.type, delivery.subject)
        attempt = await tell(store, sender, endpoint, delivery.event, body)
    return await asyncio.to_thread(_record, store, endpoint, delivery, attempt)


async def tell(store: Store, sender: Sender, endpoint: WebhookEndpoint, event: str, body: bytes) -> Attempt:
    """Sign a message and send it once."""
    try:
        secrets = await asyncio.to_thread(signing_secrets, store, endpoint)
    except LuthierError as error:
        return Attempt(error=error.message)
    return await sender.send(endpoint.url, signed_headers(secrets, event, now(), body), body)


async def send_test(store: Store, sender: Sender, endpoint: WebhookEndpoint, type: EventType) -> Attempt:
    """Tell an endpoint of something that did not happen, once, whatever types it is told otherwise."""
    event = new_id("evt_")
    return await tell(store, sender, endpoint, event, event_body(event, now(), type, "test"))


def event_body(event: str, created_at: int, type: EventType, subject: str) -> bytes:
    """Return an event as OpenAI's clients read it; the same bytes with every attempt."""
    body = {"id": event, "object": "event", "created_at": created_at, "type": type, "data": {"id": subject}}
    return json.dumps(body, separators=(",", ":")).encode()


def _event_of(store: Store, run: Run) -> tuple[EventType | None, str]:
    event_of = EVENTS.get(run.kind)
    if event_of is None or not run.is_finished:
        return None, ""
    try:
        return event_of(store, run)
    except Exception:  # one run whose files are damaged must not keep the others from being announced
        log.exception("what ended with run %s is not known; nobody is told of it", run.id)
        return None, ""


def _new_delivery(ended: Ended, type: EventType | None, subject: str) -> Callable[[WebhookEndpoint], WebhookDelivery]:
    event, moment = new_id("evt_"), now()

    def new(endpoint: WebhookEndpoint) -> WebhookDelivery:
        assert type is not None  # noqa: S101 - no endpoint wants to know of an end without a type
        return WebhookDelivery(
            id=new_id("whd_"),
            project=endpoint.project,
            parent=endpoint.id,
            created_at=int(ended.finished_at),
            event=event,
            type=type,
            subject=subject,
            next_attempt_at=moment,
            expires_at=moment + KEEP_SECONDS,
        )

    return new


def _record(store: Store, endpoint: WebhookEndpoint, delivery: WebhookDelivery, attempt: Attempt) -> WebhookDelivery:
    done = _after(delivery, attempt, given_up=endpoint.disabled is not None or attempt.status_code == GONE)
    with suppress(NotFoundError):  # the endpoint, and all that belongs to it, may be deleted by now
        if attempt.status_code == GONE:
            gone = {"disabled": "its address answered 410 (gone)"}
            store.outbox.endpoints.change(endpoint.project, endpoint.id, lambda one: one.model_copy(update=gone))
        store.outbox.deliveries.change(delivery.project, delivery.id, lambda _: done)
    return done


def _after(delivery: WebhookDelivery, attempt: Attempt, *, given_up: bool) -> WebhookDelivery:
    attempts, moment = delivery.attempts + 1, now()
    not_taken = "failed" if given_up or attempts >= MAX_ATTEMPTS else "pending"
    return delivery.model_copy(
        update={
            "attempts": attempts,
            "status": "delivered" if attempt.succeeded else not_taken,
            "status_code": attempt.status_code,
            "error": attempt.error,
            "last_attempt_at": moment,
            "next_attempt_at": moment + round(delay_seconds(attempts)),
        }
    )
