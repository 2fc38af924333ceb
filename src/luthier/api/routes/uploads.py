"""``/v1/uploads``: large files in parts."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from luthier.api.routes.files import show_file
from luthier.api.service import TheService, Writer
from luthier.records.file import StoredFile, UploadPurpose
from luthier.records.upload import Upload
from luthier.serve.api_error import ApiError
from luthier.workflows.uploads import add_part, cancel_upload, complete_upload, start_upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


class ExpiresAfter(BaseModel):
    """When the file is to be deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class UploadRequest(BaseModel):
    """What is going to be uploaded."""

    model_config = ConfigDict(extra="allow")

    filename: str = Field(min_length=1, max_length=255)
    purpose: UploadPurpose
    bytes: int = Field(ge=1)
    mime_type: str = Field(max_length=255)
    expires_after: ExpiresAfter | None = None


class CompletionRequest(BaseModel):
    """The parts in their order."""

    model_config = ConfigDict(extra="allow")

    part_ids: list[str] = Field(min_length=1, max_length=10_000)
    md5: str | None = None


@router.post("")
def create_upload(body: UploadRequest, caller: Writer, service: TheService) -> dict[str, Any]:
    """Begin an upload."""
    if body.bytes > service.limits.file_bytes:
        limit = service.limits.file_bytes
        raise ApiError(413, f"bytes: a file has at most {limit} bytes.", param="bytes", code="file_too_large")
    seconds = body.expires_after.seconds if body.expires_after else None
    return _show(start_upload(service.store, caller.project, body.filename, body.purpose, body.bytes, seconds))


@router.post("/{upload_id}/parts")
def create_part(upload_id: str, data: UploadFile, caller: Writer, service: TheService) -> dict[str, Any]:
    """Take a part."""
    part = add_part(service.store, caller.project, upload_id, data.file)
    return {"id": part.id, "object": "upload.part", "created_at": part.created_at, "upload_id": part.parent}


@router.post("/{upload_id}/complete")
def complete(upload_id: str, body: CompletionRequest, caller: Writer, service: TheService) -> dict[str, Any]:
    """Make the file."""
    return _show(*complete_upload(service.store, caller.project, upload_id, body.part_ids, body.md5))


@router.post("/{upload_id}/cancel")
def cancel(upload_id: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Give it up."""
    return _show(cancel_upload(service.store, caller.project, upload_id))


def _show(upload: Upload, file: StoredFile | None = None) -> dict[str, Any]:
    shown = {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
    }
    return shown | ({"file": show_file(file)} if file else {})
