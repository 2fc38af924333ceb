"""The service calls itself: batches and evals go through the same routes as everybody's requests."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from starlette.types import ASGIApp, Message

from luthier.api.middleware import REQUEST_ID
from luthier.api.service import CALLER
from luthier.jobs.resident_context import Answer
from luthier.records.access import Caller

__all__ = ["Answer", "call"]

log = logging.getLogger("luthier.api")


async def call(app: ASGIApp, caller: Caller, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
    """Send a request to the service without a network. The caller is trusted; cancelling this cancels the request.

    Args:
        app: The application.
        caller: In whose name.
        method: Such as ``POST``.
        path: Such as ``/v1/chat/completions``.
        body: Sent as JSON.
    """
    content = json.dumps(body or {}).encode()
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "client": None,
        "server": None,
        CALLER: caller,
    }
    status, headers, received, sent = 0, dict[bytes, bytes](), bytearray(), False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # nobody who calls from within disconnects
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        elif message["type"] == "http.response.body":
            received.extend(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        if not status:
            raise
        log.exception("a request from within was answered with %d", status)  # a bug is answered, then raised
    retry_after = headers.get(b"retry-after", b"").decode()
    seconds = float(retry_after) if retry_after.isdecimal() else None
    return Answer(status, json.loads(bytes(received) or b"null"), scope.get(REQUEST_ID, ""), seconds)
