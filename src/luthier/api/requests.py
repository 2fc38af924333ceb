"""Every request from its arrival to the end of its answer: an id, a bug as an answer, what is told of it afterwards.

The outermost of what a request goes through. What looks at requests (metrics, logs, traces) is told when they end.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.api.errors import respond
from luthier.api.service import ADMISSION, CALLER, REQUEST_ID
from luthier.records.access import Caller
from luthier.serve.api_error import ApiError
from luthier.serve.usage import USAGE, Usage

UNMATCHED = "unmatched"
CLIENT_CLOSED_REQUEST = 499

log = logging.getLogger("luthier.requests")


@dataclass
class Exchange:
    """A request and what came of it. ``status`` is 0 until an answer begins; ``internal`` is the service's own."""

    scope: Scope
    id: str
    internal: bool
    usage: Usage = field(default_factory=Usage)
    started_at_ns: int = field(default_factory=time.time_ns)
    status: int = 0
    seconds: float = 0.0

    @property
    def method(self) -> str:
        """The HTTP method."""
        return str(self.scope["method"])

    @property
    def route(self) -> str:
        """The path of the route with its parameters' names, such as ``/v1/files/{file_id}``."""
        return str(getattr(self.scope.get("route"), "path_format", UNMATCHED))

    @property
    def caller(self) -> Caller | None:
        """Who asked; None where nobody was known."""
        return self.scope.get(CALLER)

    @property
    def headers(self) -> Headers:
        """The request's headers."""
        return Headers(scope=self.scope)


Observer = Callable[[Exchange], None]


class Requests:
    """Give every request an id and an answer, and tell observers once it is over.

    Args:
        app: What answers.
        observers: Called after every request, in this order; they must be quick.
    """

    def __init__(self, app: ASGIApp, observers: Sequence[Observer] = ()) -> None:
        self.app = app
        self.observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a bug becomes a 500 and a traceback in the log."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, f"req_{uuid.uuid4().hex}", internal=CALLER in scope)
        scope[REQUEST_ID] = exchange.id

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                admission = scope.get(ADMISSION)
                limits = admission.headers if admission else ()
                message["headers"] = [*message["headers"], (b"x-request-id", exchange.id.encode()), *limits]
            await send(message)

        token = USAGE.set(exchange.usage)
        try:
            await self.app(scope, receive, send_marked)
        except Exception as error:
            if exchange.status:
                raise  # the answer has begun; breaking it off says that it is not whole
            log.exception("request %s failed", exchange.id)
            await respond(ApiError(500, f"The server has a bug ({type(error).__name__}).", "server_error"))(
                scope, receive, send_marked
            )
        finally:
            USAGE.reset(token)
            if (outer := USAGE.get()) is not None:
                outer.add(exchange.usage)  # a request that asks the service itself pays for what it asks
            self._tell(exchange)

    def _tell(self, exchange: Exchange) -> None:
        exchange.seconds = time.perf_counter() - exchange.usage.started
        exchange.status = exchange.status or CLIENT_CLOSED_REQUEST
        for observe in self.observers:
            try:
                observe(exchange)
            except Exception:  # what looks on must not break what it looks at
                log.exception("request %s could not be observed", exchange.id)
