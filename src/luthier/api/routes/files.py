"""``/v1/files``."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Response, UploadFile
from fastapi.responses import FileResponse

from luthier.api.paging import list_of
from luthier.api.service import Reader, TheService, Writer
from luthier.records.file import FilePurpose, StoredFile, UploadPurpose
from luthier.serve.api_error import ApiError
from luthier.store.collection import Order
from luthier.workflows.files import add_file, delete_file, file_path, get_file, list_files

router = APIRouter(prefix="/v1/files", tags=["files"])
Lifetime = Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2_592_000)]
Anchor = Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")]


@router.post("")
def create_file(
    file: UploadFile,
    purpose: Annotated[UploadPurpose, Form()],
    caller: Writer,
    service: TheService,
    seconds: Lifetime = None,
    anchor: Anchor = None,
) -> dict[str, Any]:
    """Upload a file."""
    if (file.size or 0) > service.limits.file_bytes:
        limit = service.limits.file_bytes
        raise ApiError(413, f"file: more than {limit} bytes.", param="file", code="file_too_large")
    name = file.filename or ""
    return show_file(add_file(service.store, caller.project, name, purpose, file.file, expires_after_seconds=seconds))


@router.get("")
def find_files(
    caller: Reader,
    service: TheService,
    purpose: FilePurpose | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """List files."""
    page = list_files(service.store, caller.project, purpose=purpose, limit=limit, order=order, after=after)
    return list_of(page, show_file)


@router.get("/{file_id}")
def retrieve_file(file_id: str, caller: Reader, service: TheService) -> dict[str, Any]:
    """Describe a file."""
    return show_file(get_file(service.store, caller.project, file_id))


@router.delete("/{file_id}")
def remove_file(file_id: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Delete a file."""
    return {"id": delete_file(service.store, caller.project, file_id).id, "object": "file", "deleted": True}


@router.get("/{file_id}/content")
def retrieve_content(
    file_id: str, caller: Reader, service: TheService, encoding: Literal["base64"] | None = None
) -> Response:
    """Return a file's bytes; ``encoding=base64`` gives result files as OpenAI's own service does."""
    file = get_file(service.store, caller.project, file_id)
    path = file_path(service.store, caller.project, file_id)
    if encoding == "base64":
        return Response(base64.b64encode(path.read_bytes()), media_type="text/plain")
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


def show_file(file: StoredFile) -> dict[str, Any]:
    """Return a file as the SDK's ``FileObject``, whose purposes do not include ``evals``."""
    shown = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": "user_data" if file.purpose == "evals" else file.purpose,
        "status": file.status,
        "status_details": file.status_details,
    }
    return shown | ({"expires_at": file.expires_at} if file.expires_at is not None else {})
