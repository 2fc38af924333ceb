"""The OpenAI-compatible HTTP door to the models that are served."""

from __future__ import annotations

import asyncio
import hmac
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.errors import LuthierError, NotFoundError, did_you_mean
from luthier.serve.api_error import ApiError, as_api_error
from luthier.serve.chat import Chat, complete_chat, prepare_chat, stream_chat
from luthier.serve.chat_request import parse_chat_request
from luthier.serve.pool import LoadedModel, ModelPool, ServedModelInfo

MAX_BODY_BYTES = 10 * 2**20
CLIENT_CLOSED_REQUEST = 499  # nginx's word for it; nobody reads it
Result = TypeVar("Result")


def create_app(pool: ModelPool, *, api_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """Return the application. It closes the pool when it shuts down.

    Args:
        pool: The models to serve.
        api_key: What clients must send as a bearer token; None lets everybody in.
        max_body_bytes: A larger request body is answered with 413.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await pool.close()

    app = FastAPI(title="Luthier", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.pool = pool
    app.state.api_key = api_key
    app.state.max_body_bytes = max_body_bytes
    app.add_middleware(RequestIds)
    app.add_exception_handler(LuthierError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(Exception, _answer_bug)
    app.add_api_route("/health", health, methods=["GET"])
    app.include_router(router, dependencies=[Depends(_check_key)])
    return app


class RequestIds:
    """Give every response an ``x-request-id``, which OpenAI's clients show with errors."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and mark its response."""
        request_id = f"req_{uuid.uuid4().hex}"

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, receive, send_marked)


router = APIRouter(prefix="/v1")


async def health() -> dict[str, str]:
    """Say that the server is up."""
    return {"status": "ok"}


@router.get("/models")
def list_models(request: Request) -> dict[str, Any]:
    """List the models that can be asked."""
    return {"object": "list", "data": [_model(info) for info in _pool(request).models()]}


@router.get("/models/{model:path}")
def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """Describe one model."""
    models = {info.name: info for info in _pool(request).models()}
    if model not in models:
        raise _model_not_found(f"The model {model!r} does not exist.{did_you_mean(model, models)}")
    return _model(models[model])


@router.post("/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    chat_request = parse_chat_request(await _json_body(request))
    async with AsyncExitStack() as resources:
        loaded = await _lease(resources, _pool(request), chat_request.model)
        chat = prepare_chat(chat_request, loaded)
        if chat_request.stream:
            return EventStream(_events(chat), resources.pop_all())
        completion = await _unless_disconnected(request, complete_chat(chat))
    return JSONResponse(completion) if completion else Response(status_code=CLIENT_CLOSED_REQUEST)


async def _lease(resources: AsyncExitStack, pool: ModelPool, name: str) -> LoadedModel:
    try:
        return await resources.enter_async_context(pool.lease(name))
    except NotFoundError as error:
        raise _model_not_found(str(error)) from error


class EventStream(StreamingResponse):
    """Server-sent events that free what they hold at once, however the response ends."""

    def __init__(self, events: AsyncGenerator[str, None], resources: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._resources = resources
        self._resources.push_async_callback(events.aclose)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client is gone."""
        async with self._resources:
            await super().__call__(scope, receive, send)


async def _events(chat: Chat) -> AsyncGenerator[str, None]:
    """Yield a streamed answer; a failure in the middle is an event too, since the status is already sent."""
    try:
        async with aclosing(stream_chat(chat)) as chunks:
            async for chunk in chunks:
                yield _event(chunk)
    except LuthierError as error:
        yield _event(as_api_error(error).body)
        return
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_disconnected(request: Request, work: Awaitable[Result]) -> Result | None:
    """Return the result of ``work``, or cancel it and return None as soon as the client is gone."""
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


async def _json_body(request: Request) -> Any:
    limit: int = request.app.state.max_body_bytes
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")
    try:
        return json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"The request body is not JSON: {error}") from error


def _check_key(request: Request) -> None:
    wanted: str | None = request.app.state.api_key
    if wanted is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), wanted.encode()):
        raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")


def _pool(request: Request) -> ModelPool:
    pool: ModelPool = request.app.state.pool
    return pool


def _model(info: ServedModelInfo) -> dict[str, Any]:
    model = {"id": info.name, "object": "model", "created": info.created, "owned_by": info.owned_by}
    return model | ({"root": info.root} if info.root else {})


def _model_not_found(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")


def _respond(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LuthierError)  # noqa: S101 - registered for this class
    return _respond(as_api_error(error))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    return _respond(ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))


async def _answer_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    finding = error.errors()[0]
    param = ".".join(str(part) for part in finding["loc"][1:])
    return _respond(ApiError(400, f"{param}: {finding['msg']}", param=param))


async def _answer_bug(_: Request, error: Exception) -> Response:
    """Answer without details; the traceback goes to the server's log."""
    return _respond(ApiError(500, f"The server has a bug ({type(error).__name__}).", "server_error"))
