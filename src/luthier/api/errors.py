"""Every error, expected or not, as OpenAI's clients read it."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from luthier.errors import LuthierError
from luthier.serve.api_error import ApiError, as_api_error
from luthier.serve.field_errors import field_error


def answer_errors(app: FastAPI) -> None:
    """Have an application answer every error in OpenAI's shape."""
    app.add_exception_handler(LuthierError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)


def respond(error: ApiError) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LuthierError)  # noqa: S101 - registered for this class
    return respond(as_api_error(error))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    return respond(ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))


async def _answer_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    return respond(field_error([item | {"loc": item["loc"][1:]} for item in error.errors()]))
