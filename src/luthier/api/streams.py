"""Answers that come in pieces, and work that ends when its client is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from luthier.errors import LuthierError
from luthier.serve.api_error import ApiError, as_api_error
from luthier.serve.wire_json import encode_json

CLIENT_CLOSED_REQUEST = 499  # nginx's word for it; nobody reads it
AT_THE_END = "Task cancelled, timeout graceful shutdown exceeded"  # uvicorn's word to what is still under way
BROKEN_OFF = ApiError(
    503, "The server ends, and broke off this answer. Ask again.", "server_error", code="shutting_down"
)
log = logging.getLogger("luthier.api")
Result = TypeVar("Result")


class EventStream(StreamingResponse):
    """Server-sent events that free what they hold at once, however the response ends."""

    def __init__(self, events: AsyncGenerator[str, None], resources: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._resources = resources
        self._resources.push_async_callback(events.aclose)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end, the client is gone, or the server ends and can wait no longer."""
        async with self._resources:
            try:
                await super().__call__(scope, receive, send)
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or error.args != (AT_THE_END,):
                    raise
                task.uncancel()
                log.warning("A stream was broken off: the server ends.")
                body = event(BROKEN_OFF.body).encode(self.charset)
                await send({"type": "http.response.body", "body": body, "more_body": False})


def event(data: dict[str, Any] | str, name: str | None = None) -> str:
    """Return the text of one event; its data may be JSON text already."""
    line = f"data: {data if isinstance(data, str) else encode_json(data)}\n\n"
    return f"event: {name}\n{line}" if name else line


async def chunk_events(chunks: AsyncGenerator[dict[str, Any] | str, None]) -> AsyncGenerator[str, None]:
    """Yield a streamed answer, given as chunks or as their JSON texts.

    A failure in the middle is an event too, since the status is already sent.
    """
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield event(chunk)
    except LuthierError as error:
        yield event(as_api_error(error).body)
        return
    yield "data: [DONE]\n\n"


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result | None:
    """Return the result of ``work``, or cancel it and return None as soon as the client is gone.

    The body of the request must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
