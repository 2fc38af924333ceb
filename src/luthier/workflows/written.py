"""Read what clients wrote: objects whose ``type`` says what they are, with errors that name the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError

from luthier.records.grader import Written
from luthier.serve.api_error import ApiError
from luthier.serve.field_errors import Place, field_error

W = TypeVar("W", bound=Written)


def read_written(kinds: Mapping[str, type[W]], written: Any, place: Place) -> W:
    """Return an object as the record that its ``type`` names.

    Args:
        kinds: What may stand here, by ``type``.
        written: What the client sent.
        place: Where it stands in the request, such as ``("testing_criteria", 0)``.

    Raises:
        ApiError: 400; it names the field.
    """
    if not isinstance(written, dict):
        raise refused(place, "must be an object")
    kind = written.get("type")
    if kind is None:
        raise refused((*place, "type"), f"is required, and one of {', '.join(kinds)}")
    if not isinstance(kind, str) or kind not in kinds:
        raise refused((*place, "type"), f"must be one of {', '.join(kinds)}, not {kind!r}{_meant(kind, kinds)}")
    try:
        return kinds[kind].model_validate(written)
    except ValidationError as error:
        raise field_error(error.errors(), place) from error


def _meant(kind: Any, kinds: Iterable[str]) -> str:
    close = get_close_matches(kind, kinds, n=1) if isinstance(kind, str) else []
    return f". Did you mean {close[0]!r}?" if close else ""


def refused(
    place: Place, why: str, *, kind: str = "value_error", status: int = 400, code: str | None = None
) -> ApiError:
    """Return the error of a field."""
    error = field_error([{"loc": place, "msg": why, "type": kind}])
    return error if (status, code) == (400, None) else ApiError(status, error.message, param=error.param, code=code)
