"""Files of a project: keep, read, delete."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import BinaryIO

from luthier.errors import InputError, NotFoundError
from luthier.ingest.uploaded import problems_of
from luthier.records.file import FilePurpose, StoredFile
from luthier.records.stored import Page, new_id, now
from luthier.serve.api_error import ApiError
from luthier.store.collection import Order
from luthier.store.store import Store

CONTENT = "content"
MAX_NAME = 255
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f]")


def add_file(
    store: Store,
    project: str,
    filename: str,
    purpose: FilePurpose,
    source: BinaryIO,
    *,
    expires_after_seconds: int | None = None,
    id: str | None = None,
) -> StoredFile:
    """Keep a file: its bytes first, then its record, so that whatever is listed is there.

    A file that cannot be used for its purpose is kept with the status ``error``, and says why, with line numbers.

    Args:
        store: Where it is kept.
        project: Whose it is.
        filename: Its name, as the client knows it; it is never used as a path.
        purpose: What it is for.
        source: Its bytes, read once from where they stand.
        expires_after_seconds: When it is to be deleted.
        id: Its id, where that must be the same if it is made again; a fresh one otherwise.

    Raises:
        ConflictError: there is a file of that id.
        InputError: the name is empty or too long, or has control characters.
        DiskFullError: the disk is full; nothing is left behind.
    """
    if not filename or len(filename) > MAX_NAME:
        raise InputError(f"A file name has 1 to {MAX_NAME} letters; this one has {len(filename)}.")
    if CONTROL_CHARACTER.search(filename):
        raise InputError(f"The file name {filename!r} has control characters in it.")
    id = id or new_id("file-")
    with store.artifacts.new(_key(id)) as folder, (folder / CONTENT).open("wb") as target:
        shutil.copyfileobj(source, target)
        size = target.tell()
    problems = problems_of(store.artifacts.path(_key(id)) / CONTENT, purpose)
    created_at = now()
    expires_at = created_at + expires_after_seconds if expires_after_seconds else None
    return store.files.add(
        StoredFile(
            id=id,
            project=project,
            created_at=created_at,
            filename=filename,
            purpose=purpose,
            bytes=size,
            status="error" if problems else "processed",
            status_details=problems,
            expires_at=expires_at,
        )
    )


def get_file(store: Store, project: str, id: str) -> StoredFile:
    """Return a project's file; one that has expired is gone.

    Raises:
        NotFoundError: the project has no such file.
    """
    file = store.files.get(project, id)
    if file.expires_at is not None and file.expires_at <= now():
        raise NotFoundError(f"The file {id!r} has expired.")
    return file


def file_for(store: Store, project: str, id: str, purpose: FilePurpose, param: str) -> StoredFile:
    """Return the file that a request names in the field ``param``, where it has a purpose.

    Raises:
        ApiError: 404 where the project has no such file, 400 where it has another purpose; both name the field.
    """
    try:
        file = get_file(store, project, id)
    except NotFoundError as error:
        raise ApiError(404, str(error), param=param, code="file_not_found") from error
    if file.purpose != purpose:
        message = f"The file {id!r} ({file.filename}) has the purpose {file.purpose!r}, not {purpose!r}."
        raise ApiError(400, message, param=param, code="invalid_file")
    return file


def list_files(
    store: Store,
    project: str,
    *,
    purpose: FilePurpose | None = None,
    limit: int = 10_000,
    order: Order = "desc",
    after: str | None = None,
) -> Page[StoredFile]:
    """Return a part of a project's files, or of those of a purpose.

    Raises:
        NotFoundError: there is no file with the id ``after``.
    """
    expire_files(store)
    fields = {"purpose": purpose} if purpose else None
    return store.files.page(project, limit=limit, order=order, after=after, fields=fields)


def expire_files(store: Store) -> None:
    """Delete the files of all projects that have expired; the service calls this from time to time."""
    for file in store.files.expired(now()):
        delete_file(store, file.project, file.id)


def file_path(store: Store, project: str, id: str) -> Path:
    """Return where a project's file lies, to be read.

    Raises:
        NotFoundError: the project has no such file.
    """
    return store.artifacts.path(_key(get_file(store, project, id).id)) / CONTENT


def delete_file(store: Store, project: str, id: str) -> StoredFile:
    """Delete a file: its record first, so that whatever is listed is there.

    Raises:
        NotFoundError: the project has no such file.
    """
    file = store.files.remove(project, id)
    store.artifacts.remove(_key(id))
    return file


def remove_remains(store: Store, id: str) -> None:
    """Delete the bytes of a file that has no record, because its maker was killed."""
    store.artifacts.remove(_key(id))


def _key(id: str) -> str:
    return f"files/{id}"
