"""Artifacts: folders of files that appear whole or not at all.

Everything is written into a staging folder first, then renamed to its place, so that a kill or a full disk at any
moment leaves either the old state or the new one. What a killed process left in staging is cleared later.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier.errors import ConflictError, DiskFullError, IntegrityError

STAGING = ".staging"
STALE_STAGING_SECONDS = 24 * 3600
READ_BYTES = 1 << 20


class Artifacts:
    """The artifact folder.

    Args:
        root: Where it lies; made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / STAGING).mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Return the path of a key such as ``datasets/tweets/1``.

        Raises:
            ConflictError: the key would leave the artifact folder.
        """
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root.resolve()) or path == self.root.resolve():
            raise ConflictError(f"The artifact key {key!r} is not a path inside the artifact folder.")
        return path

    @contextmanager
    def new(self, key: str) -> Iterator[Path]:
        """Give an empty folder to fill; on leaving it without an error it becomes ``key``, at once and whole.

        Raises:
            ConflictError: the key exists already.
            DiskFullError: the disk is full; nothing is left behind.
        """
        target = self.path(key)
        if target.exists():
            raise ConflictError(f"The artifact {key!r} exists already; artifacts are never changed.")
        staged = self.root / STAGING / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with full_disk_is_an_error(self.root):
                staged.mkdir()
                yield staged
                _sync(staged)
                target.parent.mkdir(parents=True, exist_ok=True)
                _rename(staged, target, key)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def remove(self, key: str) -> None:
        """Delete an artifact; missing is fine. It vanishes at once, its bytes a moment later."""
        target = self.path(key)
        if target.exists():
            doomed = self.root / STAGING / f"{os.getpid()}-{uuid.uuid4().hex}"
            target.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def clear_stale_staging(self) -> None:
        """Delete what processes that died more than a day ago left in staging."""
        for folder in (self.root / STAGING).iterdir():
            with suppress(FileNotFoundError):  # its process has finished it meanwhile
                if time.time() - folder.stat().st_mtime > STALE_STAGING_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def full_disk_is_an_error(place: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into a :class:`DiskFullError` that names the place."""
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        free = shutil.disk_usage(place).free
        raise DiskFullError(
            f"The disk is full: writing below {place} failed with {free / 1e6:.0f} MB free.",
            hint="free some space, then go on with: luthier run resume",
        ) from error


def _is_full_disk(error: Exception) -> bool:
    """Return whether an error means "no space left"; safetensors wraps the system's error in one without a number."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"(os error {errno.ENOSPC})" in str(error)


def file_hash(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def folder_bytes(folder: Path) -> int:
    """Return the sum of the sizes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_hashes(folder: Path, expected: dict[str, str]) -> None:
    """Compare every file with its recorded hash.

    Raises:
        IntegrityError: naming each file that is missing or differs.
    """
    problems = []
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_hash(path) != sha256:
            problems.append(f"{name} has changed")
    if problems:
        raise IntegrityError(f"The files in {folder} are not the recorded ones.", problems=problems)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _rename(staged: Path, target: Path, key: str) -> None:
    try:
        staged.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ConflictError(f"The artifact {key!r} was made by another process meanwhile.") from error
