"""Stored completions: keep an answer with its request, find it again, label it; read it as OpenAI shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.errors import NotFoundError
from luthier.records.stored import Metadata, Page
from luthier.records.stored_completion import StoredCompletion
from luthier.store.collection import BLOCK, Order
from luthier.store.store import Store

Dict = dict[str, Any]
# What OpenAI shows of a request beside its answer.
SHOWN = (
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "tool_choice",
    "tools",
    "response_format",
)


def keep_completion(
    store: Store, project: str, request: Dict, completion: Dict, *, request_id: str | None = None
) -> StoredCompletion:
    """Keep a request and its finished ``chat.completion``; once this returns, they are there after any kill.

    Raises:
        DiskFullError: the disk is full.
    """
    return store.completions.add(
        StoredCompletion(
            id=completion["id"],
            project=project,
            created_at=completion["created"],
            metadata=request.get("metadata"),
            model=completion["model"],
            request=request,
            completion=completion,
            request_id=request_id,
        )
    )


def list_completions(
    store: Store,
    project: str,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    limit: int = 20,
    order: Order = "asc",
) -> Page[StoredCompletion]:
    """Return a part of a project's stored completions; ``metadata`` None means those without any.

    Raises:
        NotFoundError: there is none with the id ``after``.
    """
    return store.completions.page(
        project,
        model=model,
        metadata=metadata,
        no_metadata=metadata is None,
        after=after,
        limit=limit,
        order=order,
    )


def completions_of(
    store: Store,
    project: str,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    created_after: int | None = None,
    created_before: int | None = None,
) -> Iterator[StoredCompletion]:
    """Yield a project's stored completions, the oldest first, some held at a time.

    Args:
        store: Where they are.
        project: Whose.
        model: Only answers of this model, by the name that was asked.
        metadata: Only those with all of these labels.
        created_after: Only those of this moment (Unix seconds) or later.
        created_before: Only those of this moment or earlier.
    """
    after: str | None = None
    more = True
    while more:
        page = store.completions.page(project, model=model, metadata=metadata, after=after, limit=BLOCK, order="asc")
        for stored in page.items:
            if (created_after is None or stored.created_at >= created_after) and (
                created_before is None or stored.created_at <= created_before
            ):
                yield stored
        more, after = page.has_more, page.items[-1].id if page.items else None


def label_completion(store: Store, project: str, id: str, metadata: Metadata | None) -> StoredCompletion:
    """Replace the labels of a stored completion.

    Raises:
        NotFoundError: the project has none of that id.
    """
    return store.completions.change(project, id, lambda it: it.model_copy(update={"metadata": metadata}))


def completion_object(stored: StoredCompletion) -> Dict:
    """Return a stored completion as ``chat.completion`` with its labels and the options of its request."""
    request = stored.request
    return {
        **{name: request.get(name) for name in SHOWN},
        "input_user": request.get("user"),
        "request_id": stored.request_id,
        **stored.completion,
        "metadata": stored.metadata or {},
    }


def message_page(stored: StoredCompletion, *, after: str | None, limit: int, order: Order) -> Page[Dict]:
    """Return a part of the messages that were sent, as OpenAI shows them.

    Raises:
        NotFoundError: there is no message with the id ``after``.
    """
    messages = [_message(stored, index, message) for index, message in enumerate(stored.request["messages"])]
    if order == "desc":
        messages.reverse()
    if after is not None:
        places = [place for place, message in enumerate(messages) if message["id"] == after]
        if not places:
            raise NotFoundError(f"The completion {stored.id!r} has no message {after!r}.")
        messages = messages[places[0] + 1 :]
    return Page(items=tuple(messages[:limit]), has_more=len(messages) > limit)


def _message(stored: StoredCompletion, index: int, message: Dict) -> Dict:
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = "".join(part.get("text", "") for part in parts) if parts is not None else content
    return {"refusal": None, **message, "id": f"{stored.id}-{index}", "content": text, "content_parts": parts}
