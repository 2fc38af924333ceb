"""Files that clients upload, and files that the service makes for them."""

from __future__ import annotations

from typing import Literal

from luthier.records.stored import Stored

UploadPurpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
FilePurpose = Literal[UploadPurpose, "fine-tune-results", "batch_output"]
FileStatus = Literal["uploaded", "processed", "error"]


class StoredFile(Stored):
    """A file: its bytes lie in the artifact folder ``files/<id>``.

    ``status`` is ``error`` where the content does not fit the purpose, and ``status_details`` says why, with line
    numbers. ``expires_at`` is in Unix seconds; then the file is deleted.
    """

    filename: str
    purpose: FilePurpose
    bytes: int
    status: FileStatus = "processed"
    status_details: str | None = None
    expires_at: int | None = None
