"""What the production log holds, as rows of a run: what was asked is the item, what was answered is the sample."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from luthier.records.eval import LoggedResponses, LoggedSource
from luthier.records.response import StoredResponse
from luthier.records.stored_completion import StoredCompletion
from luthier.store.collection import BLOCK
from luthier.store.store import Store
from luthier.workflows.completions import completions_of
from luthier.workflows.eval_sampling import plain_messages, read_answer

Json = dict[str, Any]


def logged_rows(store: Store, project: str, source: LoggedSource) -> Iterator[Json]:
    """Yield the rows of a log, the oldest first. ``item.input`` has the messages, as OpenAI has them."""
    if isinstance(source, LoggedResponses):
        for response in _responses(store, project, source):
            yield {"item": _item_of_response(response), "sample": read_answer(response.response, responses=True)}
        return
    found = completions_of(
        store,
        project,
        model=source.model,
        metadata=source.metadata,
        created_after=source.created_after,
        created_before=source.created_before,
    )
    for completion in islice(found, source.limit):
        sample = read_answer(completion.completion, responses=False)
        yield {"item": _item_of_completion(completion), "sample": sample | {"model": completion.model}}


def _item_of_completion(stored: StoredCompletion) -> Json:
    return {
        "id": stored.id,
        "input": stored.request["messages"],
        "output": [choice["message"] for choice in stored.completion["choices"]],
        "model": stored.model,
        "metadata": stored.metadata or {},
    }


def _item_of_response(stored: StoredResponse) -> Json:
    instructions = stored.response.get("instructions")
    first = [{"role": "system", "content": instructions}] if isinstance(instructions, str) else []
    return {
        "id": stored.id,
        "input": first + plain_messages(stored.input),
        "output": plain_messages(stored.response["output"]),
        "model": stored.model,
        "metadata": stored.metadata or {},
    }


def _responses(store: Store, project: str, source: LoggedResponses) -> Iterator[StoredResponse]:
    after: str | None = None
    more = True
    while more:
        page = store.responses.page(
            project, model=source.model, metadata=source.metadata, after=after, limit=BLOCK, order="asc"
        )
        yield from (one for one in page.items if _is_wanted(one, source))
        more, after = page.has_more, page.items[-1].id if page.items else None


def _is_wanted(stored: StoredResponse, source: LoggedResponses) -> bool:
    response = stored.response
    tools = {tool.get("name") for tool in response.get("tools") or ()}
    effort = (response.get("reasoning") or {}).get("effort")
    return (
        (source.created_after is None or stored.created_at >= source.created_after)
        and (source.created_before is None or stored.created_at <= source.created_before)
        and (source.instructions_search or "") in str(response.get("instructions") or "")
        and source.temperature in (None, response.get("temperature"))
        and source.top_p in (None, response.get("top_p"))
        and source.reasoning_effort in (None, effort)
        and tools.issuperset(source.tools or ())
        and (not source.users or response.get("user") in source.users)
    )
