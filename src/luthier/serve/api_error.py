"""Errors in OpenAI's shape: what a request is answered with when it cannot be served."""

from __future__ import annotations

from typing import Any

from luthier.errors import (
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
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that steer the client's retries: a conflict is not worth one, an engine that died is."""
        if self.status == 409:
            return {"x-should-retry": "false"}
        return {"retry-after": str(RETRY_AFTER_SECONDS)} if self.status == 503 else {}


def as_api_error(error: LuthierError) -> ApiError:
    """Return any expected error as the one to answer with."""
    if isinstance(error, ApiError):
        return error
    for kind, status, type_, code in STATUSES:
        if isinstance(error, kind):
            return ApiError(status, str(error), type_, code=code)
    return ApiError(500, str(error), "server_error")
