"""Uploads: a large file that comes in parts."""

from __future__ import annotations

from typing import Literal

from luthier.records.file import UploadPurpose
from luthier.records.record import Record
from luthier.records.stored import Stored

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]


class UploadClaim(Record):
    """Who makes the file of an upload: a request (``id``) of a process (``owner``), ``since`` when (Unix seconds)."""

    id: str
    owner: str
    since: int


class Upload(Stored):
    """A file that comes in parts. ``bytes`` is what its client announced; ``file`` is the id of the finished file.

    ``expires_at`` (Unix seconds) is when parts are no longer taken; ``expires_after_seconds`` is for the file.
    While there is a ``claim``, its file is being made; to clients it is pending still.
    """

    filename: str
    purpose: UploadPurpose
    bytes: int
    status: UploadStatus = "pending"
    expires_at: int
    expires_after_seconds: int | None = None
    file: str | None = None
    claim: UploadClaim | None = None


class UploadPart(Stored):
    """A part of the upload ``parent``, kept as an artifact of its own."""

    parent: str
    bytes: int
