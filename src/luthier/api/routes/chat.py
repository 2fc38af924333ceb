"""``/v1/chat/completions``: answers, and those that were stored."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from luthier.api.chat_log import ChatLog, counted
from luthier.api.paging import list_of, metadata_filter
from luthier.api.service import Reader, Service, TheService, Writer
from luthier.api.streams import CLIENT_CLOSED_REQUEST, EventStream, chunk_events, unless_disconnected
from luthier.errors import InputError, NotFoundError
from luthier.records.access import Caller
from luthier.records.stored import Metadata
from luthier.serve.api_error import ApiError, model_not_found
from luthier.serve.chat import Chat, complete_chat, prepared_chat, stream_chat, stream_chat_text
from luthier.serve.chat_request import ChatRequest, refuse_unsupported
from luthier.serve.pool import LoadedModel
from luthier.store.collection import Order
from luthier.workflows.completions import (
    completion_object,
    label_completion,
    list_completions,
    message_page,
)

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])
Limit = Annotated[int, Query(ge=1, le=100)]


class CompletionUpdate(BaseModel):
    """New labels of a stored completion, in the place of its old ones."""

    model_config = ConfigDict(extra="allow")

    metadata: Metadata | None


@router.post("")
async def create_chat_completion(body: ChatRequest, request: Request, caller: Reader, service: TheService) -> Response:
    """Answer a conversation, at once or as a stream; what is to be stored is stored before the answer is complete."""
    refuse_unsupported(body)
    log = ChatLog(request, caller, body) if body.store else None
    async with AsyncExitStack() as resources:
        asked = counted(body) if log else body
        chat = await unless_disconnected(request, _prepared(resources, service, caller, asked))
        if chat is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if body.stream:
            events = chunk_events(log.keeping(stream_chat(chat)) if log else stream_chat_text(chat))
            return EventStream(events, resources.pop_all())
        completion = await unless_disconnected(request, complete_chat(chat))
    if completion and log:
        await log.keep(completion)
    return JSONResponse(completion) if completion else Response(status_code=CLIENT_CLOSED_REQUEST)


@router.get("")
def find_completions(
    request: Request,
    caller: Reader,
    service: TheService,
    model: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> dict[str, Any]:
    """List stored completions."""
    page = list_completions(
        service.store,
        caller.project,
        model=model,
        metadata=metadata_filter(request),
        after=after,
        limit=limit,
        order=order,
    )
    return list_of(page, completion_object)


@router.get("/{completion}")
def retrieve_completion(completion: str, caller: Reader, service: TheService) -> dict[str, Any]:
    """Show a stored completion."""
    return completion_object(service.store.completions.get(caller.project, completion))


@router.post("/{completion}")
def update_completion(completion: str, body: CompletionUpdate, caller: Writer, service: TheService) -> dict[str, Any]:
    """Give a stored completion other labels."""
    return completion_object(label_completion(service.store, caller.project, completion, body.metadata))


@router.delete("/{completion}")
def remove_completion(completion: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Delete a stored completion."""
    removed = service.store.completions.remove(caller.project, completion)
    return {"id": removed.id, "object": "chat.completion.deleted", "deleted": True}


@router.get("/{completion}/messages")
def list_messages(
    completion: str,
    caller: Reader,
    service: TheService,
    after: str | None = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> dict[str, Any]:
    """List the messages that a stored completion answers."""
    stored = service.store.completions.get(caller.project, completion)
    return list_of(message_page(stored, after=after, limit=limit, order=order), dict)


async def _prepared(resources: AsyncExitStack, service: Service, caller: Caller, body: ChatRequest) -> Chat:
    loaded = await lease(resources, service, caller, body.model, body.n or 1)
    return await prepared_chat(body, loaded)


async def lease(
    resources: AsyncExitStack, service: Service, caller: Caller, name: str, answers: int = 1
) -> LoadedModel:
    """Hold a model for so many answers until the resources are freed; it is loaded if need be.

    Raises:
        ApiError: 404, where the caller has no model of that name; 400, where it is one that does not write.
        EngineError: the model cannot be loaded.
        CapacityError: the model is larger than all engines may be.
        BusyError: all engines stayed busy.
    """
    try:
        return await resources.enter_async_context(service.pool.lease(name, caller.project, answers))
    except NotFoundError as error:
        raise model_not_found(str(error)) from error
    except InputError as error:
        raise ApiError(400, str(error), param="model") from error
