"""Errors in OpenAI's shape: what a request is answered with when it cannot be served."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
MAX_FINDINGS = 8
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
        retry_after_seconds: When to come again; None says what is usual for the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that steer the client's retries: an engine that died is worth one, a conflict is not."""
        if self.status in (409, 504):
            return {"x-should-retry": "false"}
        if self.retry_after_seconds is not None:
            seconds = self.retry_after_seconds
            return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
        return {"retry-after": str(RETRY_AFTER_SECONDS)} if self.status == 503 else {}


def model_not_found(message: str) -> ApiError:
    """Return the error of a model that the caller does not have."""
    return ApiError(404, message, param="model", code="model_not_found")


def field_error(findings: Sequence[tuple[tuple[int | str, ...], str, str]]) -> ApiError:
    """Return pydantic's findings (place, message, kind) as one error.

    ``param`` is the path of the innermost field, as in ``messages[0].role``.
    """
    found = [(_path(place), message, kind) for place, message, kind in findings]
    param, _, kind = max(found, key=lambda finding: len(finding[0]))
    return ApiError(
        400,
        "; ".join(f"{path}: {message}" if path else message for path, message, _ in found[:MAX_FINDINGS]),
        param=param or None,
        code="missing_required_parameter" if kind == "missing" else "invalid_value",
    )


def _path(place: tuple[int | str, ...]) -> str:
    """Return pydantic's place of a finding without the members of unions that it tried (``str``, ``list[…]``)."""
    parts = [part for part in place if isinstance(part, int) or _is_field(part)]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _is_field(part: str) -> bool:
    return part.isidentifier() and part != "str" and not part[0].isupper()


def as_api_error(error: LuthierError) -> ApiError:
    """Return any expected error as the one to answer with."""
    if isinstance(error, ApiError):
        return error
    for kind, status, type_, code in STATUSES:
        if isinstance(error, kind):
            return ApiError(status, str(error), type_, code=code)
    return ApiError(500, str(error), "server_error")
