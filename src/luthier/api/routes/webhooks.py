"""``/v1/webhook_endpoints``: who is told when a job, a batch or a run of an evaluation ends."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from luthier.api.paging import list_of
from luthier.api.service import Admin, TheService
from luthier.records.webhook import EVENT_TYPES, Address, EndpointName, EventType, WebhookDelivery, WebhookEndpoint
from luthier.serve.api_error import ApiError
from luthier.serve.webhooks import Sender
from luthier.workflows import webhooks
from luthier.workflows.deliveries import send_test

router = APIRouter(prefix="/v1", tags=["webhooks"])
Limit = Annotated[int, Query(ge=1, le=100)]
EventTypes = Annotated[list[EventType], Field(min_length=1)]


class EndpointRequest(BaseModel):
    """An endpoint to be made."""

    model_config = ConfigDict(extra="allow")

    name: EndpointName
    url: Address
    event_types: EventTypes


class EndpointChange(BaseModel):
    """What is to change; what is not given stays."""

    model_config = ConfigDict(extra="allow")

    name: EndpointName | None = None
    url: Address | None = None
    event_types: EventTypes | None = None


class RotationRequest(BaseModel):
    """How to replace a secret."""

    model_config = ConfigDict(extra="allow")

    keep_old_secret_active_for_24_hours: bool = False


class TestRequest(BaseModel):
    """What to pretend."""

    model_config = ConfigDict(extra="allow")

    event_type: EventType


@router.get("/webhook_event_types")
def list_event_types(caller: Admin) -> dict[str, Any]:
    """List the types of events."""
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/webhook_endpoints")
def create_endpoint(body: EndpointRequest, caller: Admin, service: TheService) -> dict[str, Any]:
    """Make an endpoint; its secret is shown this once."""
    made, secret = webhooks.create_endpoint(service.store, caller.project, body.name, body.url, body.event_types)
    return _show(made) | {"signing_secret": secret}


@router.get("/webhook_endpoints")
def list_endpoints(caller: Admin, service: TheService, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """List endpoints, the newest first."""
    return list_of(webhooks.list_endpoints(service.store, caller.project, after=after, limit=limit), _show)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
def retrieve_endpoint(webhook_endpoint_id: str, caller: Admin, service: TheService) -> dict[str, Any]:
    """Describe an endpoint."""
    return _show(webhooks.get_endpoint(service.store, caller.project, webhook_endpoint_id))


@router.post("/webhook_endpoints/{webhook_endpoint_id}")
def update_endpoint(
    webhook_endpoint_id: str, body: EndpointChange, caller: Admin, service: TheService
) -> dict[str, Any]:
    """Change an endpoint; one that was disabled is told things again."""
    changes = {name: value for name in ("name", "url", "event_types") if (value := getattr(body, name)) is not None}
    return _show(webhooks.update_endpoint(service.store, caller.project, webhook_endpoint_id, **changes))


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
def remove_endpoint(webhook_endpoint_id: str, caller: Admin, service: TheService) -> dict[str, Any]:
    """Delete an endpoint, and what it was still to be told."""
    gone = webhooks.delete_endpoint(service.store, caller.project, webhook_endpoint_id)
    return {"id": gone.id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
def rotate_secret(
    webhook_endpoint_id: str, caller: Admin, service: TheService, body: RotationRequest | None = None
) -> dict[str, Any]:
    """Replace an endpoint's secret; the new one is shown this once."""
    keep = body is not None and body.keep_old_secret_active_for_24_hours
    store, project = service.store, caller.project
    changed, secret = webhooks.rotate_secret(store, project, webhook_endpoint_id, keep_old_for_24_hours=keep)
    return _show(changed) | {"signing_secret": secret}


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test")
async def test_endpoint(
    webhook_endpoint_id: str, body: TestRequest, caller: Admin, service: TheService
) -> dict[str, Any]:
    """Tell an endpoint of something that did not happen, and say what it answered."""
    endpoint = webhooks.get_endpoint(service.store, caller.project, webhook_endpoint_id)
    sender = Sender(service.webhook_targets)
    try:
        attempt = await send_test(service.store, sender, endpoint, body.event_type)
    finally:
        await sender.close()
    if attempt.status_code is None:
        raise ApiError(400, f"The endpoint was not reached: {attempt.error}.", code="endpoint_unreachable")
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": endpoint.id,
        "event_type": body.event_type,
        "status_code": attempt.status_code,
        "success": True,
    }


@router.get("/webhook_endpoints/{webhook_endpoint_id}/deliveries")
def list_deliveries(
    webhook_endpoint_id: str, caller: Admin, service: TheService, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """List what an endpoint was told and is to be told, the newest first. OpenAI has no such route."""
    page = webhooks.list_deliveries(service.store, caller.project, webhook_endpoint_id, after=after, limit=limit)
    return list_of(page, _delivery)


def _show(endpoint: WebhookEndpoint) -> dict[str, Any]:
    """Return an endpoint as the SDK's ``WebhookEndpoint``; ``disabled`` is ours, and says why."""
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "created_at": endpoint.created_at,
        "updated_at": endpoint.updated_at,
        "signing_secret_hint": f"whsec_…{endpoint.secret_hint}",
        "disabled": endpoint.disabled,
    }


def _delivery(delivery: WebhookDelivery) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "object": "webhook_delivery",
        "webhook_endpoint_id": delivery.parent,
        "event_id": delivery.event,
        "event_type": delivery.type,
        "subject": delivery.subject,
        "created_at": delivery.created_at,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "last_attempt_at": delivery.last_attempt_at,
        "next_attempt_at": delivery.next_attempt_at if delivery.status == "pending" else None,
        "status_code": delivery.status_code,
        "error": delivery.error,
    }
