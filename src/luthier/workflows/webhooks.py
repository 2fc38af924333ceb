"""Webhook endpoints of a project: make, change, delete, and the secrets that they are told things with."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from luthier.errors import ConflictError, InputError, IntegrityError
from luthier.records.stored import Page, new_id, now
from luthier.records.webhook import EventType, WebhookDelivery, WebhookEndpoint
from luthier.serve.webhooks import check_address, secret_text
from luthier.store.store import Store

MAX_ENDPOINTS = 100
HINT_LETTERS = 5  # the last one is padding
KEEP_OLD_SECRET_SECONDS = 24 * 3600


def create_endpoint(
    store: Store, project: str, name: str, url: str, event_types: Sequence[EventType]
) -> tuple[WebhookEndpoint, str]:
    """Make an endpoint; return it and its secret, which is shown now and never again.

    Raises:
        InputError: the address, the name or the types are not valid.
        ConflictError: the project has too many.
    """
    check_address(url)
    if len(list(store.outbox.endpoints.all(project))) >= MAX_ENDPOINTS:
        raise ConflictError(f"A project has at most {MAX_ENDPOINTS} webhook endpoints.")
    id, created_at = new_id("we_"), now()
    secret = _derive(store, id, 1)
    endpoint = _checked(
        {
            "id": id,
            "project": project,
            "created_at": created_at,
            "updated_at": created_at,
            "name": name,
            "url": url,
            "event_types": _unique(event_types),
            "secret_hint": _hint(secret),
        }
    )
    return store.outbox.endpoints.add(endpoint), secret_text(secret)


def get_endpoint(store: Store, project: str, id: str) -> WebhookEndpoint:
    """Return an endpoint.

    Raises:
        NotFoundError: the project has none of that id.
    """
    return store.outbox.endpoints.get(project, id)


def list_endpoints(store: Store, project: str, *, after: str | None = None, limit: int = 20) -> Page[WebhookEndpoint]:
    """Return a part of a project's endpoints, the newest first.

    Raises:
        NotFoundError: there is no endpoint with the id ``after``.
    """
    return store.outbox.endpoints.page(project, after=after, limit=limit)


def update_endpoint(store: Store, project: str, id: str, **changes: Any) -> WebhookEndpoint:
    """Change an endpoint's ``name``, ``url`` or ``event_types``; one that was disabled is told things again.

    Raises:
        InputError: a value is not valid.
        NotFoundError: the project has none of that id.
    """
    if "url" in changes:
        check_address(changes["url"])
    if "event_types" in changes:
        changes["event_types"] = _unique(changes["event_types"])

    def change(endpoint: WebhookEndpoint) -> WebhookEndpoint:
        values = endpoint.model_dump() | changes | {"disabled": None}
        changed = _checked(values)
        return changed if changed == endpoint else changed.model_copy(update={"updated_at": now()})

    return store.outbox.endpoints.change(project, id, change)


def rotate_secret(
    store: Store, project: str, id: str, *, keep_old_for_24_hours: bool = False
) -> tuple[WebhookEndpoint, str]:
    """Give an endpoint a new secret; return both. The old one signs too for a day, if asked.

    Raises:
        NotFoundError: the project has none of that id.
    """

    def change(endpoint: WebhookEndpoint) -> WebhookEndpoint:
        generation, moment = endpoint.generation + 1, now()
        update = {
            "generation": generation,
            "secret_hint": _hint(_derive(store, id, generation)),
            "old_secret_until": moment + KEEP_OLD_SECRET_SECONDS if keep_old_for_24_hours else None,
            "updated_at": moment,
        }
        return endpoint.model_copy(update=update)

    endpoint = store.outbox.endpoints.change(project, id, change)
    return endpoint, secret_text(_derive(store, id, endpoint.generation))


def delete_endpoint(store: Store, project: str, id: str) -> WebhookEndpoint:
    """Delete an endpoint and what it was still to be told.

    Raises:
        NotFoundError: the project has none of that id.
    """
    endpoint = store.outbox.endpoints.get(project, id)
    store.outbox.remove_endpoint(project, id)
    return endpoint


def list_deliveries(
    store: Store, project: str, id: str, *, after: str | None = None, limit: int = 20
) -> Page[WebhookDelivery]:
    """Return a part of what an endpoint was told or is to be told, the newest first.

    Raises:
        NotFoundError: the project has no such endpoint, or there is no delivery with the id ``after``.
    """
    store.outbox.endpoints.get(project, id)
    return store.outbox.deliveries.page(project, parent=id, after=after, limit=limit)


def signing_secrets(store: Store, endpoint: WebhookEndpoint) -> list[bytes]:
    """Return the secrets to sign with: the endpoint's, and the one before it while that is still good.

    Raises:
        IntegrityError: the home's key file is not the one that the secret was made with.
    """
    secret = _derive(store, endpoint.id, endpoint.generation)
    if not hmac.compare_digest(_hint(secret), endpoint.secret_hint):
        raise IntegrityError(
            f"{store.secret_key.path} is not the key that the secret of {endpoint.id} was made with.",
            hint=f"put it back from a backup, or: luthier webhook rotate-secret {endpoint.id}",
        )
    old = endpoint.old_secret_until is not None and now() < endpoint.old_secret_until
    return [secret, _derive(store, endpoint.id, endpoint.generation - 1)] if old else [secret]


def _derive(store: Store, id: str, generation: int) -> bytes:
    return store.secret_key.derive(f"webhook {id} {generation}")


def _hint(secret: bytes) -> str:
    return secret_text(secret)[-HINT_LETTERS:]


def _unique(event_types: Sequence[EventType]) -> list[EventType]:
    return list(dict.fromkeys(event_types))


def _checked(values: dict[str, Any]) -> WebhookEndpoint:
    try:
        return WebhookEndpoint.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise InputError("The webhook endpoint is not valid.", problems=problems) from error
