"""What every thing has that the API keeps for a project: an id, an owner, a time, and the user's own labels."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Generic, TypeVar

from pydantic import Field

from luthier.records.record import Record

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
ID_BYTES = 16


def new_id(prefix: str) -> str:
    """Return a fresh id that nobody can guess: ``new_id("file-")``."""
    return f"{prefix}{secrets.token_hex(ID_BYTES)}"


def now() -> int:
    """Return the time in Unix seconds."""
    return int(time.time())


class Stored(Record):
    """The root of the records in a :class:`luthier.store.collection.Collection`.

    A subclass may have ``parent`` (the id of the thing that it belongs to), ``status`` and ``model``; a collection can
    be searched by these. ``created_at`` is in Unix seconds.
    """

    id: str
    project: str
    created_at: int
    metadata: Metadata | None = None


Item = TypeVar("Item")


class Page(Record, Generic[Item]):
    """A part of a list, and whether more of it follows."""

    items: tuple[Item, ...]
    has_more: bool
