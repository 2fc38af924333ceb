"""A bound on every request's body."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.api.errors import respond
from luthier.api.service import REQUEST_ID, Limits
from luthier.serve.api_error import ApiError

__all__ = ["REQUEST_ID", "BodyLimit"]

FILE_ROUTES = ("/v1/files", "/v1/uploads/")  # these take files in multipart bodies
MULTIPART_BYTES = 2**16  # what a form adds to its file
READ_TO_BE_HEARD = 2**25  # bytes over the bound: many clients send all before they listen, and would see a reset
READ_SECONDS = 10.0


class BodyLimit:
    """Answer 413 to a body that is too large; one that is so by little is read first, so that its client hears it."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whose body is counted as it comes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        takes_file = scope["path"].startswith(FILE_ROUTES)
        limit = self.limits.file_bytes + MULTIPART_BYTES if takes_file else self.limits.body_bytes
        error = ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            if int(length) <= limit + READ_TO_BE_HEARD:
                await _read_away(receive)
            await respond(error)(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise error
            return message

        await self.app(scope, receive_counted, send)


async def _read_away(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(READ_SECONDS):
            while (await receive()).get("more_body"):
                pass
