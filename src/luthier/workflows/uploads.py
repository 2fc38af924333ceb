"""Uploads: take a large file in parts, and make it a file once all are there."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from luthier.errors import ConflictError, InputError
from luthier.records.file import StoredFile, UploadPurpose
from luthier.records.stored import new_id, now
from luthier.records.upload import Upload, UploadPart, UploadStatus
from luthier.store.store import Store
from luthier.workflows.files import CONTENT, add_file

HOUR = 3600
PART_BYTES = 64 * 2**20
PREFIX = "upload_"


def start_upload(
    store: Store, project: str, filename: str, purpose: UploadPurpose, bytes: int, expires_after_seconds: int | None
) -> Upload:
    """Begin an upload, which takes parts for an hour."""
    created_at = now()
    return store.uploads.add(
        Upload(
            id=new_id(PREFIX),
            project=project,
            created_at=created_at,
            filename=filename,
            purpose=purpose,
            bytes=bytes,
            expires_at=created_at + HOUR,
            expires_after_seconds=expires_after_seconds,
        )
    )


def add_part(store: Store, project: str, upload_id: str, data: BinaryIO) -> UploadPart:
    """Keep a part; once this returns, it is there after any kill.

    Raises:
        NotFoundError: the project has no such upload.
        ConflictError: it takes no parts any more.
        InputError: the part is larger than 64 MiB.
    """
    _pending(store, project, upload_id)
    id = new_id("part_")
    with store.artifacts.new(_key(id)) as folder, (folder / CONTENT).open("wb") as target:
        shutil.copyfileobj(data, target)
        size = target.tell()
        if size > PART_BYTES:
            raise InputError(f"A part has at most {PART_BYTES} bytes; this one has {size}.")
    return store.upload_parts.add(UploadPart(id=id, project=project, created_at=now(), parent=upload_id, bytes=size))


def complete_upload(
    store: Store, project: str, upload_id: str, part_ids: Sequence[str], md5: str | None = None
) -> tuple[Upload, StoredFile]:
    """Make the file of an upload from its parts, in the order of their ids; they are deleted.

    Raises:
        NotFoundError: the project has no such upload.
        ConflictError: it is not pending.
        InputError: a part is unknown or named twice, or the bytes or their MD5 are not as announced.
    """
    upload = _pending(store, project, upload_id)
    known = {part.id: part for part in store.upload_parts.all(project, parent=upload_id)}
    for id in part_ids:
        if id not in known or part_ids.count(id) > 1:
            raise InputError(f"part_ids: {id!r} is not a part of {upload_id}, or it is named twice.")
    size = sum(known[id].bytes for id in part_ids)
    if size != upload.bytes:
        raise InputError(f"part_ids: the parts have {size} bytes, and {upload.bytes} were announced.")
    paths = [store.artifacts.path(_key(id)) / CONTENT for id in part_ids]
    if md5 is not None and _md5(paths) != md5.lower():
        raise InputError(f"md5: the parts have the MD5 {_md5(paths)}, not {md5}.")
    source = io.BufferedReader(_Joined(paths))
    file_id = "file-" + upload.id.removeprefix(PREFIX)  # the same file, if this is done again after a kill
    store.artifacts.remove(f"files/{file_id}")
    file = add_file(
        store,
        project,
        upload.filename,
        upload.purpose,
        source,
        expires_after_seconds=upload.expires_after_seconds,
        id=file_id,
    )
    done = _end(store, upload, "completed", file.id)
    return done, file


def cancel_upload(store: Store, project: str, upload_id: str) -> Upload:
    """Give an upload up; its parts are deleted.

    Raises:
        NotFoundError: the project has no such upload.
        ConflictError: it is not pending.
    """
    return _end(store, _pending(store, project, upload_id), "cancelled")


def expire_uploads(store: Store) -> None:
    """End the uploads of all projects whose hour is over; the service calls this from time to time."""
    for upload in store.uploads.everywhere("pending"):
        if upload.expires_at <= now():
            _end(store, upload, "expired")


def _pending(store: Store, project: str, upload_id: str) -> Upload:
    upload = store.uploads.get(project, upload_id)
    if upload.status == "pending" and upload.expires_at <= now():
        upload = _end(store, upload, "expired")
    if upload.status != "pending":
        raise ConflictError(f"The upload {upload_id} is {upload.status}.")
    return upload


def _end(store: Store, upload: Upload, status: UploadStatus, file: str | None = None) -> Upload:
    done = store.uploads.change(
        upload.project, upload.id, lambda it: it.model_copy(update={"status": status, "file": file})
    )
    for part in store.upload_parts.all(upload.project, parent=upload.id):
        store.artifacts.remove(_key(part.id))
        store.upload_parts.remove(part.project, part.id)
    return done


def _key(part_id: str) -> str:
    return f"uploads/{part_id}"


def _md5(paths: Sequence[Path]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for block in _blocks(paths):
        digest.update(block)
    return digest.hexdigest()


def _blocks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(io.DEFAULT_BUFFER_SIZE):
                yield block


class _Joined(io.RawIOBase):
    """Files one after the other, read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._blocks = _blocks(paths)
        self._left = b""

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer."""
        self._left = self._left or next(self._blocks, b"")
        taken, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)
