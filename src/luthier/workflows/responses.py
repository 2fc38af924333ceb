"""Responses of a project: keep one, go on from one, read and delete it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.errors import NotFoundError
from luthier.records.response import Item, StoredResponse
from luthier.records.stored import Page, now
from luthier.store.collection import Order
from luthier.store.store import Store

LIFETIME_SECONDS = 30 * 24 * 3600  # as long as OpenAI keeps them


def keep_response(store: Store, project: str, response: dict[str, Any], items: Sequence[Item]) -> StoredResponse:
    """Keep a finished response and all items that its model was given; once this returns, they survive any kill.

    Raises:
        DiskFullError: the disk is full.
    """
    created_at = int(response["created_at"])
    return store.responses.add(
        StoredResponse(
            id=response["id"],
            project=project,
            created_at=created_at,
            metadata=response["metadata"] or None,
            model=response["model"],
            response=response,
            input=tuple(items),
            expires_at=created_at + LIFETIME_SECONDS,
        )
    )


def get_response(store: Store, project: str, id: str) -> StoredResponse:
    """Return a project's response; one that has expired is gone.

    Raises:
        NotFoundError: the project has none of that id.
    """
    found = store.responses.get(project, id)
    if found.expires_at <= now():
        raise NotFoundError(f"The response {id!r} has expired.")
    return found


def conversation_before(store: Store, project: str, previous_id: str | None) -> tuple[Item, ...]:
    """Return the items that a response begins with which goes on from another; none where it does not.

    Raises:
        NotFoundError: the project has no response of that id.
    """
    return () if previous_id is None else get_response(store, project, previous_id).conversation


def delete_response(store: Store, project: str, id: str) -> None:
    """Delete a response; those that went on from it keep what they were given.

    Raises:
        NotFoundError: the project has none of that id.
    """
    store.responses.remove(project, id)


def input_items(
    store: Store, project: str, id: str, *, after: str | None = None, limit: int = 20, order: Order = "desc"
) -> Page[Item]:
    """Return a part of the items that a response's model was given.

    Raises:
        NotFoundError: the project has no such response, or it has no item ``after``.
    """
    items = list(get_response(store, project, id).input)
    if order == "desc":
        items.reverse()
    places = [index for index, item in enumerate(items) if item["id"] == after]
    if after is not None and not places:
        raise NotFoundError(f"The response {id!r} has no item {after!r}.")
    rest = items[places[0] + 1 :] if places else items
    return Page(items=tuple(rest[:limit]), has_more=len(rest) > limit)


def expire_responses(store: Store) -> None:
    """Delete the responses of all projects that have expired; the service calls this from time to time."""
    for response in store.responses.expired(now()):
        store.responses.remove(response.project, response.id)
