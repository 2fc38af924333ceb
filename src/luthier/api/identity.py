"""Who calls, and whether its key has enough left: known before anything of the request's body is read."""

from __future__ import annotations

import asyncio
import ipaddress
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.api.errors import respond
from luthier.api.rate_limits import RateLimiter
from luthier.api.service import ADMISSION, CALLER, Service
from luthier.serve.api_error import ApiError

OPEN_TO_ALL = frozenset({"/health", "/ready", "/openapi.json"})
LIMITED = "/v1/"
ASKS_MODELS = ("/v1/chat/", "/v1/completions", "/v1/embeddings", "/v1/responses")
BYTES_PER_TOKEN = 4
THREADS = 2


class Identity:
    """Answer 401 to whoever is not known, and 429 to a key that has nothing left. The service's own calls pass.

    Keys are looked up in threads of its own, so that nobody waits at the door for what others are doing.

    Args:
        app: What answers.
        service: Knows the keys.
        limiter: Knows what they have left.
    """

    def __init__(self, app: ASGIApp, service: Service, limiter: RateLimiter) -> None:
        self.app = app
        self.service = service
        self.limiter = limiter
        self._threads = ThreadPoolExecutor(THREADS, "identity")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its caller."""
        if scope["type"] == "http" and CALLER not in scope and scope["path"] not in OPEN_TO_ALL:
            try:
                await self._admit(scope)
            except ApiError as error:
                await respond(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        look_up, said = self.service.caller, headers.get("authorization", "")
        caller = await asyncio.get_running_loop().run_in_executor(self._threads, look_up, said)
        if caller.key is None:
            _refuse_other_sites(headers)
        scope[CALLER] = caller
        if scope["path"].startswith(LIMITED):
            scope[ADMISSION] = self.limiter.admit(caller, _estimate(scope, headers))


def _refuse_other_sites(headers: Headers) -> None:
    """Refuse what a page of another site has a browser of this machine send, where no key keeps it out.

    Such a page's name may point at this machine (DNS rebinding), which shows in ``Host``; or it asks without that
    trick, which shows in ``Origin``.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    for name, said, address in (("Host", host, f"//{host}"), ("Origin", origin, origin)):
        if address is not None and not _is_here(address):
            message = (
                f"This service has no keys, so it answers this machine alone, and {name} says {said!r}. "
                "Make a key (luthier key create), or ask 127.0.0.1."
            )
            raise ApiError(403, message, code="forbidden_host")


def _is_here(address: str) -> bool:
    try:
        name = urlsplit(address).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _estimate(scope: Scope, headers: Headers) -> int:
    """Return how many tokens a request's prompt may have, before it is read."""
    length = headers.get("content-length", "")
    asks = scope["method"] == "POST" and scope["path"].startswith(ASKS_MODELS)
    return int(length[:12]) // BYTES_PER_TOKEN if asks and length.isdecimal() else 0
