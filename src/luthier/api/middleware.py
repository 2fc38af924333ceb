"""A bound on every request's body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.api.errors import respond
from luthier.api.service import REQUEST_ID, Limits
from luthier.serve.api_error import ApiError

__all__ = ["REQUEST_ID", "BodyLimit"]

FILE_ROUTES = ("/v1/files", "/v1/uploads/")  # these take files in multipart bodies
MULTIPART_BYTES = 2**16  # what a form adds to its file


class BodyLimit:
    """Answer 413 to a body that is too large, as soon as that is known."""

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
