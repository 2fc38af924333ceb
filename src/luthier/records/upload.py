"""Uploads: a large file that comes in parts."""

from __future__ import annotations

from typing import Literal

from luthier.records.file import UploadPurpose
from luthier.records.stored import Stored

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]


class Upload(Stored):
    """A file that comes in parts. ``bytes`` is what its client announced; ``file`` is the id of the finished file.

    ``expires_at`` (Unix seconds) is when parts are no longer taken; ``expires_after_seconds`` is for the file.
    """

    filename: str
    purpose: UploadPurpose
    bytes: int
    status: UploadStatus = "pending"
    expires_at: int
    expires_after_seconds: int | None = None
    file: str | None = None


class UploadPart(Stored):
    """A part of the upload ``parent``, kept as an artifact of its own."""

    parent: str
    bytes: int
