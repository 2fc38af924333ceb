"""What a JSON body may be, checked before any route sees it.

Parsers differ in what they make of broken or ambiguous JSON, and databases in what they keep. So a body is refused that
is not UTF-8, is nested deeply, names a key twice, or has numbers or characters that not everything behind can hold.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.api.errors import respond
from luthier.serve.api_error import ApiError

MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1
LARGE_BYTES = 2**18  # from here on, a thread looks at it
CHUNK_SECONDS = 60.0
# An escape that may stand for NUL or for half of a pair of surrogates; only then are the strings looked at.
SUSPICIOUS = re.compile(rb"\\u(0000|[dD][89a-fA-F])")
LONE_SURROGATE_OR_NUL = re.compile("[\x00\ud800-\udfff]")
TYPES = ("application/json", "multipart/form-data")


class JsonBodies:
    """Answer 400 to a JSON body that is not sound, and 415 to one of a type that no route takes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body read if it is JSON."""
        if scope["type"] == "http":
            try:
                receive = await _checked(scope, receive)
            except ApiError as error:
                await respond(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _checked(scope: Scope, receive: Receive) -> Receive:
    """Return what gives a request's body again after it was checked.

    Raises:
        ApiError: 400, 408, 413 or 415.
    """
    if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
        raise ApiError(400, "The path and the query have no NUL characters in them.")
    headers = Headers(scope=scope)
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return receive
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in TYPES:
        message = f"The content type {kind!r} is not one of {', '.join(TYPES)}."
        raise ApiError(415, message, code="unsupported_content_type")
    if kind != "application/json":
        return receive
    body = await _read(receive)
    if len(body) > LARGE_BYTES:
        await asyncio.to_thread(check_json, body)
    else:
        check_json(body)
    return _again(body, receive)


async def _read(receive: Receive) -> bytes:
    """Read a whole body; where its bound is exceeded, ``receive`` raises.

    Raises:
        ApiError: 408, where it stops coming.
    """
    chunks = []
    more = True
    while more:
        try:
            async with asyncio.timeout(CHUNK_SECONDS):  # wait_for may swallow a cancellation in Python 3.11
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"The body did not go on for {CHUNK_SECONDS:g} seconds.") from None
        chunks.append(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
    return b"".join(chunks)


def _again(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def check_json(body: bytes) -> None:
    """Look whether a body is JSON that everything behind can hold.

    Raises:
        ApiError: 400, saying why not.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise _refused(f"it is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _refused(f"{error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise _refused(f"it is nested deeper than {MAX_DEPTH} levels") from error
    _check_depth(value)
    if SUSPICIOUS.search(body):
        _check_strings(value)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _refused(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_strings(value: Any) -> None:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if LONE_SURROGATE_OR_NUL.search(one):
                raise _refused("a string has a NUL character or half of a surrogate pair in it")
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        known: set[str] = set()
        twice = next(name for name, _ in pairs if name in known or known.add(name))  # type: ignore[func-returns-value]
        raise _refused(f"the key {twice!r} is there twice")
    return found


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else MAX_INTEGER + 1
    if abs(number) > MAX_INTEGER:
        raise _refused(f"the number {text[:20]}{'…' if len(text) > 20 else ''} does not fit into 64 bits")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _refused(f"the number {text[:20]} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise _refused(f"{name} is no JSON number")


def _refused(why: str) -> ApiError:
    return ApiError(400, f"The body is no JSON that can be read: {why}.", code="invalid_json")
