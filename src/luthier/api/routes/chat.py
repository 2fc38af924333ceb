"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from luthier.api.service import Reader, Service, TheService
from luthier.api.streams import CLIENT_CLOSED_REQUEST, EventStream, event, unless_disconnected
from luthier.errors import LuthierError, NotFoundError
from luthier.records.access import Caller
from luthier.serve.api_error import as_api_error, model_not_found
from luthier.serve.chat import Chat, complete_chat, prepare_chat, stream_chat
from luthier.serve.chat_request import ChatRequest, refuse_unsupported
from luthier.serve.pool import LoadedModel

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])


@router.post("")
async def create_chat_completion(body: ChatRequest, request: Request, caller: Reader, service: TheService) -> Response:
    """Answer a conversation, at once or as a stream."""
    refuse_unsupported(body)
    async with AsyncExitStack() as resources:
        loaded = await lease(resources, service, caller, body.model)
        chat = prepare_chat(body, loaded)
        if body.stream:
            return EventStream(_events(chat), resources.pop_all())
        completion = await unless_disconnected(request, complete_chat(chat))
    return JSONResponse(completion) if completion else Response(status_code=CLIENT_CLOSED_REQUEST)


async def lease(resources: AsyncExitStack, service: Service, caller: Caller, name: str) -> LoadedModel:
    """Hold a model until the resources are freed; it is loaded if need be.

    Raises:
        ApiError: 404, where the caller has no model of that name.
        EngineError: the model cannot be loaded.
        CapacityError: all engines stayed busy.
    """
    try:
        return await resources.enter_async_context(service.pool.lease(name, caller.project))
    except NotFoundError as error:
        raise model_not_found(str(error)) from error


async def _events(chat: Chat) -> AsyncGenerator[str, None]:
    """Yield a streamed answer; a failure in the middle is an event too, since the status is already sent."""
    try:
        async with aclosing(stream_chat(chat)) as chunks:
            async for chunk in chunks:
                yield event(chunk)
    except LuthierError as error:
        yield event(as_api_error(error).body)
        return
    yield "data: [DONE]\n\n"
