"""Lists as OpenAI's clients page through them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from luthier.records.stored import Page
from luthier.serve.api_error import ApiError

Item = TypeVar("Item")
METADATA_PARAMETER = re.compile(r"metadata\[(.*)\]", re.DOTALL)  # a key may have brackets of its own


def list_of(page: Page[Item], show: Callable[[Item], dict[str, Any]]) -> dict[str, Any]:
    """Return a page as ``SyncCursorPage`` reads it; the next one is asked for with ``after=<last_id>``."""
    data = [show(item) for item in page.items]
    ids = [item["id"] for item in data]
    first_id, last_id = (ids[0], ids[-1]) if ids else (None, None)
    return {"object": "list", "data": data, "has_more": page.has_more, "first_id": first_id, "last_id": last_id}


def metadata_filter(request: Request) -> dict[str, str] | None:
    """Return the labels that ``metadata[key]=value`` asks for; None means things without any (``metadata=null``).

    Raises:
        ApiError: 400, where ``metadata`` is given in another way.
    """
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if match := METADATA_PARAMETER.fullmatch(name):
            wanted[match.group(1)] = value
        elif name == "metadata":
            if value not in ("null", ""):
                raise ApiError(400, "metadata: give it as metadata[key]=value, or metadata=null.", param="metadata")
            return None
    return wanted
