"""Files of a project: keep, read, delete."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import BinaryIO

from luthier.errors import InputError
from luthier.records.file import FilePurpose, StoredFile
from luthier.records.stored import new_id, now
from luthier.store.store import Store

CONTENT = "content"
MAX_NAME = 255


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
        InputError: the name is empty or too long.
        DiskFullError: the disk is full; nothing is left behind.
    """
    if not filename or len(filename) > MAX_NAME:
        raise InputError(f"A file name has 1 to {MAX_NAME} letters; this one has {len(filename)}.")
    id = id or new_id("file-")
    with store.artifacts.new(_key(id)) as folder, (folder / CONTENT).open("wb") as target:
        shutil.copyfileobj(source, target)
        size = target.tell()
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
            expires_at=expires_at,
        )
    )


def file_path(store: Store, project: str, id: str) -> Path:
    """Return where a project's file lies, to be read.

    Raises:
        NotFoundError: the project has no such file.
    """
    return store.artifacts.path(_key(store.files.get(project, id).id)) / CONTENT


def delete_file(store: Store, project: str, id: str) -> StoredFile:
    """Delete a file: its record first, so that whatever is listed is there.

    Raises:
        NotFoundError: the project has no such file.
    """
    file = store.files.remove(project, id)
    store.artifacts.remove(_key(id))
    return file


def _key(id: str) -> str:
    return f"files/{id}"
