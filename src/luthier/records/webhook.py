"""Webhooks: addresses of a project that are told when its runs end, and what is to be told to each."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from luthier.records.stored import Stored

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "eval.run.succeeded",
    "eval.run.failed",
    "eval.run.canceled",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
EndpointName = Annotated[str, Field(min_length=1, max_length=256)]
Address = Annotated[str, Field(min_length=1, max_length=2048)]
DeliveryStatus = Literal["pending", "delivered", "failed"]


class WebhookEndpoint(Stored):
    """An address, and the types of events that it is told.

    Its secret is derived from the home's key, the id and ``generation``, and is kept nowhere; ``secret_hint`` is its
    end. The secret of the generation before signs too until ``old_secret_until``. ``disabled`` says why nothing is
    sent. Times are Unix seconds.
    """

    name: EndpointName
    url: Address
    event_types: tuple[EventType, ...] = Field(min_length=1)
    updated_at: int
    generation: int = 1
    secret_hint: str
    old_secret_until: int | None = None
    disabled: str | None = None


class WebhookDelivery(Stored):
    """An event that one endpoint (``parent``) is to be told until it answers with 2xx, or until it is given up.

    ``event`` is the event's id, which goes along as ``webhook-id`` with every attempt; ``subject`` is the id of the
    job, batch or run of an evaluation. Times are Unix seconds; after ``expires_at`` the record is deleted.
    """

    parent: str
    status: DeliveryStatus = "pending"
    event: str
    type: EventType
    subject: str
    attempts: int = 0
    next_attempt_at: int
    last_attempt_at: int | None = None
    status_code: int | None = None
    error: str | None = None
    expires_at: int
