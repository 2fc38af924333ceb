"""Uploads: take a large file in parts, and make it a file once all are there."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from luthier.errors import ConflictError, InputError, NotFoundError
from luthier.jobs.worker import is_dead, this_owner
from luthier.records.file import StoredFile, UploadPurpose
from luthier.records.stored import new_id, now
from luthier.records.upload import Upload, UploadClaim, UploadPart, UploadStatus
from luthier.store.store import Store
from luthier.workflows.files import CONTENT, add_file, get_file, remove_remains

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
    part = store.upload_parts.add(UploadPart(id=id, project=project, created_at=now(), parent=upload_id, bytes=size))
    try:
        _pending(store, project, upload_id)
    except ConflictError:  # it has ended meanwhile, perhaps before it could know of this part
        _remove_part(store, part)
        raise
    return part


def complete_upload(
    store: Store, project: str, upload_id: str, part_ids: Sequence[str], md5: str | None = None
) -> tuple[Upload, StoredFile]:
    """Make the file of an upload from its parts, in the order of their ids; they are deleted.

    One request at a time makes it. Where it is there already, it is returned.

    Raises:
        NotFoundError: the project has no such upload.
        ConflictError: it is being completed, was cancelled or has expired, or its file was deleted.
        InputError: a part is unknown or named twice, or the bytes or their MD5 are not as announced.
    """
    upload = _current(store, store.uploads.get(project, upload_id))
    done = _file_of(store, upload)
    if upload.status == "completed" and done is not None:
        return upload, done
    upload = _claim(store, upload)
    try:
        file = _make_file(store, upload, part_ids, md5)
        return _end(store, upload, "completed", file.id), file
    except BaseException:
        _release(store, upload)
        raise


def cancel_upload(store: Store, project: str, upload_id: str) -> Upload:
    """Give an upload up; its parts are deleted.

    Raises:
        NotFoundError: the project has no such upload.
        ConflictError: it is not pending, or is being completed.
    """
    return _end(store, _pending(store, project, upload_id), "cancelled")


def expire_uploads(store: Store) -> None:
    """End the uploads of all projects whose hour is over; the service calls this from time to time."""
    for upload in store.uploads.everywhere("pending"):
        with suppress(ConflictError):  # it ends by itself
            _current(store, upload)


def _make_file(store: Store, upload: Upload, part_ids: Sequence[str], md5: str | None) -> StoredFile:
    known = {part.id: part for part in store.upload_parts.all(upload.project, parent=upload.id)}
    for id in part_ids:
        if id not in known or part_ids.count(id) > 1:
            raise InputError(f"part_ids: {id!r} is not a part of {upload.id}, or it is named twice.")
    size = sum(known[id].bytes for id in part_ids)
    if size != upload.bytes:
        raise InputError(f"part_ids: the parts have {size} bytes, and {upload.bytes} were announced.")
    paths = [store.artifacts.path(_key(id)) / CONTENT for id in part_ids]
    if md5 is not None and _md5(paths) != md5.lower():
        raise InputError(f"md5: the parts have the MD5 {_md5(paths)}, not {md5}.")
    remove_remains(store, _file_id(upload))
    return add_file(
        store,
        upload.project,
        upload.filename,
        upload.purpose,
        io.BufferedReader(_Joined(paths)),
        expires_after_seconds=upload.expires_after_seconds,
        id=_file_id(upload),
    )


def _pending(store: Store, project: str, upload_id: str) -> Upload:
    """Return an upload that can be changed.

    Raises:
        NotFoundError: the project has no such upload.
        ConflictError: it is not pending, or is being completed.
    """
    upload = _current(store, store.uploads.get(project, upload_id))
    if upload.status != "pending" or _is_claimed(upload):
        raise _conflict(upload)
    return upload


def _current(store: Store, upload: Upload) -> Upload:
    """Return an upload as it is by now: completed, if whoever made its file was killed at the very end, or expired.

    Raises:
        ConflictError: it was changed meanwhile.
    """
    if upload.status != "pending" or _is_claimed(upload):
        return upload
    file = _file_of(store, upload)
    if file is not None:
        return _end(store, upload, "completed", file.id)
    return _end(store, upload, "expired") if upload.expires_at <= now() else upload


def _claim(store: Store, upload: Upload) -> Upload:
    """Take an upload that nobody completes.

    Raises:
        ConflictError: it is being completed, or has ended.
    """
    claim = UploadClaim(id=new_id("claim_"), owner=this_owner(), since=now())

    def take(found: Upload) -> Upload:
        if found.status != "pending" or _is_claimed(found):
            raise _conflict(found)
        return found.model_copy(update={"claim": claim})

    return store.uploads.change(upload.project, upload.id, take)


def _is_claimed(upload: Upload) -> bool:
    """Return whether somebody makes the file: a process that lives, for no longer than an hour."""
    claim = upload.claim
    return claim is not None and now() < claim.since + HOUR and not is_dead(claim.owner)


def _release(store: Store, upload: Upload) -> None:
    """Let go of an upload whose file could not be made."""
    store.uploads.change(
        upload.project,
        upload.id,
        lambda found: found.model_copy(update={"claim": None}) if found.claim == upload.claim else found,
    )


def _end(store: Store, upload: Upload, status: UploadStatus, file: str | None = None) -> Upload:
    """End an upload, and delete its parts.

    Raises:
        ConflictError: it has ended, or was claimed, since it was read.
    """

    def end(found: Upload) -> Upload:
        if (found.status, found.claim) != ("pending", upload.claim):
            raise _conflict(found)
        return found.model_copy(update={"status": status, "file": file, "claim": None})

    done = store.uploads.change(upload.project, upload.id, end)
    if file is None:
        remove_remains(store, _file_id(upload))
    for part in store.upload_parts.all(upload.project, parent=upload.id):
        _remove_part(store, part)
    return done


def _conflict(upload: Upload) -> ConflictError:
    status = "being completed" if upload.status == "pending" else upload.status
    return ConflictError(f"The upload {upload.id} is {status}.")


def _file_id(upload: Upload) -> str:
    """Return the id of an upload's file: the same, if it is made again after a kill."""
    return "file-" + upload.id.removeprefix(PREFIX)


def _file_of(store: Store, upload: Upload) -> StoredFile | None:
    try:
        return get_file(store, upload.project, _file_id(upload))
    except NotFoundError:
        return None


def _remove_part(store: Store, part: UploadPart) -> None:
    store.artifacts.remove(_key(part.id))
    with suppress(NotFoundError):  # removed by another request meanwhile
        store.upload_parts.remove(part.project, part.id)


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
