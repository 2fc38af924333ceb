"""``/v1/responses``: answers to conversations, kept so that the next request can go on from one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from luthier.api.paging import list_of
from luthier.api.routes.chat import lease
from luthier.api.service import Reader, Service, TheService, Writer
from luthier.api.streams import CLIENT_CLOSED_REQUEST, EventStream, event, unless_disconnected
from luthier.errors import NotFoundError
from luthier.records.access import Caller
from luthier.records.response import Item
from luthier.serve.api_error import ApiError
from luthier.serve.response_items import items_of
from luthier.serve.response_request import ResponseRequest, refuse_unsupported
from luthier.serve.responses import ResponseRun, complete_response, prepared_response, stream_response
from luthier.store.collection import Order
from luthier.store.store import Store
from luthier.workflows.responses import (
    conversation_before,
    delete_response,
    get_response,
    input_items,
    keep_response,
)

router = APIRouter(prefix="/v1/responses", tags=["responses"])


@router.post("")
async def create_response(body: ResponseRequest, request: Request, caller: Reader, service: TheService) -> Response:
    """Answer, at once or as a stream; what is to be kept is kept before the answer is complete."""
    refuse_unsupported(body)
    items = await asyncio.to_thread(_conversation, service.store, caller.project, body)
    async with AsyncExitStack() as resources:
        run = await unless_disconnected(request, _prepared(resources, service, caller, body, items))
        if run is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

        async def keep(response: dict[str, Any]) -> None:
            if body.is_stored:
                await asyncio.to_thread(keep_response, service.store, caller.project, response, items)

        if body.stream:
            return EventStream(_events(stream_response(run, keep)), resources.pop_all())
        response = await unless_disconnected(request, complete_response(run))
    if response is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    await keep(response)
    return JSONResponse(response)


@router.post("/input_tokens")
async def count_input_tokens(body: ResponseRequest, caller: Reader, service: TheService) -> dict[str, Any]:
    """Count the tokens that a request's model would be given."""
    refuse_unsupported(body)
    items = await asyncio.to_thread(_conversation, service.store, caller.project, body)
    async with AsyncExitStack() as resources:
        run = await _prepared(resources, service, caller, body, items)
    return {"object": "response.input_tokens", "input_tokens": len(run.chat.prompt_tokens)}


@router.get("/{response}")
def retrieve_response(response: str, caller: Reader, service: TheService, stream: bool = False) -> dict[str, Any]:
    """Show a kept response."""
    if stream:
        message = "stream: a kept response is given whole."
        raise ApiError(400, message, param="stream", code="unsupported_parameter")
    return get_response(service.store, caller.project, response).response


@router.delete("/{response}")
def remove_response(response: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Delete a kept response."""
    delete_response(service.store, caller.project, response)
    return {"id": response, "object": "response", "deleted": True}


@router.post("/{response}/cancel")
def cancel_response(response: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Refuse to cancel: only responses in the background can be, and there are none."""
    found = get_response(service.store, caller.project, response)
    raise ApiError(400, f"The response {found.id!r} is finished; close its stream to cancel one under way.")


@router.get("/{response}/input_items")
def list_input_items(
    response: str,
    caller: Reader,
    service: TheService,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Order = "desc",
) -> dict[str, Any]:
    """List what the model of a kept response was given."""
    page = input_items(service.store, caller.project, response, after=after, limit=limit, order=order)
    return list_of(page, dict)


async def _prepared(
    resources: AsyncExitStack, service: Service, caller: Caller, body: ResponseRequest, items: tuple[Item, ...]
) -> ResponseRun:
    return await prepared_response(body, items, await lease(resources, service, caller, body.model))


def _conversation(store: Store, project: str, body: ResponseRequest) -> tuple[Item, ...]:
    """Return the items of the response that a request goes on from, and its own.

    Raises:
        ApiError: 400, where the project has no such response.
    """
    try:
        before = conversation_before(store, project, body.previous_response_id)
    except NotFoundError as error:
        param = "previous_response_id"
        raise ApiError(400, f"{param}: {error}", param=param, code="previous_response_not_found") from error
    return (*before, *items_of(body.input))


async def _events(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for one in events:
            yield event(one, one["type"])
