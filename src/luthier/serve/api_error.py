"""Errors in OpenAI's shape: what a request is answered with when it cannot be served."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from luthier.errors import (
    BusyError,
    CapacityError,
    ConflictError,
    EngineError,
    InputError,
    LuthierError,
    NotFoundError,
)

RETRY_AFTER_SECONDS = 1
STATUSES: tuple[tuple[type[LuthierError], int, str, str | None], ...] = (
    (InputError, 400, "invalid_request_error", None),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (ConflictError, 409, "invalid_request_error", "conflict"),
    (BusyError, 429, "requests", "overloaded"),
    (CapacityError, 503, "server_error", "overloaded"),
    (EngineError, 503, "server_error", "engine_unavailable"),
)


class ApiError(LuthierError):
    """An error with all that OpenAI's clients look at.

    Args:
        status: The HTTP status.
        message: What is wrong, the value, and the rule.
        type: OpenAI's coarse kind, such as ``invalid_request_error``.
        param: The path of the offending field, such as ``messages[0].role``.
        code: OpenAI's fine kind, such as ``model_not_found``.
        retry_after_seconds: When to come again; None says what is usual for the status.
        more_headers: What else the answer's headers say.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
        more_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.more_headers = dict(more_headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers, most of them to steer the client's retries: an engine that died is worth one, a conflict is not."""
        return self._retry_headers | self.more_headers

    @property
    def _retry_headers(self) -> dict[str, str]:
        if self.status in (409, 504):
            return {"x-should-retry": "false"}
        if self.retry_after_seconds is not None:
            seconds = self.retry_after_seconds
            return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
        return {"retry-after": str(RETRY_AFTER_SECONDS)} if self.status in (429, 503) else {}


def model_not_found(message: str) -> ApiError:
    """Return the error of a model that the caller does not have."""
    return ApiError(404, message, param="model", code="model_not_found")


def as_api_error(error: LuthierError) -> ApiError:
    """Return any expected error as the one to answer with."""
    if isinstance(error, ApiError):
        return error
    for kind, status, type_, code in STATUSES:
        if isinstance(error, kind):
            return ApiError(status, str(error), type_, code=code)
    return ApiError(500, str(error), "server_error")
