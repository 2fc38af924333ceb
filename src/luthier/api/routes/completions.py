"""``/v1/completions``: text that goes on from a prompt, without a chat format."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from luthier.api.routes.chat import lease
from luthier.api.service import Reader, Service, TheService
from luthier.api.streams import CLIENT_CLOSED_REQUEST, EventStream, chunk_events, unless_disconnected
from luthier.records.access import Caller
from luthier.serve.completion_request import CompletionRequest, refuse_unsupported
from luthier.serve.completions import PromptCompletion, complete, prepare_completion, stream_completion

router = APIRouter(prefix="/v1/completions", tags=["completions"])


@router.post("")
async def create_completion(body: CompletionRequest, request: Request, caller: Reader, service: TheService) -> Response:
    """Go on with a prompt, or with several, at once or as a stream."""
    refuse_unsupported(body)
    async with AsyncExitStack() as resources:
        completion = await unless_disconnected(request, _prepared(resources, service, caller, body))
        if completion is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if body.stream:
            return EventStream(chunk_events(stream_completion(completion)), resources.pop_all())
        answer = await unless_disconnected(request, complete(completion))
    return JSONResponse(answer) if answer else Response(status_code=CLIENT_CLOSED_REQUEST)


async def _prepared(
    resources: AsyncExitStack, service: Service, caller: Caller, body: CompletionRequest
) -> PromptCompletion:
    loaded = await lease(resources, service, caller, body.model, len(body.prompt or [""]) * body.candidates)
    return await asyncio.to_thread(prepare_completion, body, loaded)
