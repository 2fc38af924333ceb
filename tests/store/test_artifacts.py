"""An artifact appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from luthier.errors import CapacityError, ConflictError, DiskFullError, IntegrityError
from luthier.store.artifacts import (
    STAGING,
    STALE_STAGING_SECONDS,
    Artifacts,
    check_hashes,
    file_hash,
    file_hashes,
    folder_bytes,
    full_disk_is_an_error,
)

WRITER = """
import sys, time
from pathlib import Path
from luthier.store.artifacts import Artifacts

with Artifacts(Path(sys.argv[1])).new("models/one") as folder:
    (folder / "weights.bin").write_bytes(b"half of it")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB and 16 files, where the test may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=256k,nr_inodes=16"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def staged(artifacts: Artifacts) -> list[Path]:
    return list((artifacts.root / STAGING).iterdir())


def test_artifact_appears_at_once_when_it_is_finished(artifacts: Artifacts) -> None:
    with artifacts.new("models/one/adapter") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.bin").write_bytes(b"weights")
        assert not artifacts.path("models/one/adapter").exists()
        written = folder.stat().st_ino
    assert artifacts.path("models/one/adapter").stat().st_ino == written  # renamed as a whole, not copied
    assert (artifacts.path("models/one/adapter") / "deep" / "weights.bin").read_bytes() == b"weights"
    assert staged(artifacts) == []


def test_error_while_writing_leaves_nothing(artifacts: Artifacts) -> None:
    def write_half() -> None:
        with artifacts.new("models/one") as folder:
            (folder / "weights.bin").write_bytes(b"half of it")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_half()
    assert not artifacts.path("models/one").exists()
    assert staged(artifacts) == []


def test_process_killed_while_writing_leaves_no_artifact(artifacts: Artifacts) -> None:
    command = [sys.executable, "-c", WRITER, str(artifacts.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    assert not artifacts.path("models/one").exists()
    assert len(staged(artifacts)) == 1
    with artifacts.new("models/one") as folder:
        (folder / "weights.bin").write_bytes(b"all of it")
    assert (artifacts.path("models/one") / "weights.bin").read_bytes() == b"all of it"


def test_what_a_killed_process_left_is_cleared_after_a_day(artifacts: Artifacts) -> None:
    old, fresh = artifacts.root / STAGING / "1-old", artifacts.root / STAGING / "2-fresh"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"half of it")
    yesterday = time.time() - STALE_STAGING_SECONDS - 60
    os.utime(old, (yesterday, yesterday))
    artifacts.clear_stale_staging()
    assert staged(artifacts) == [fresh]


def test_artifact_is_never_written_twice(artifacts: Artifacts) -> None:
    with artifacts.new("models/one") as folder:
        (folder / "weights.bin").write_bytes(b"first")
    with pytest.raises(ConflictError, match="never changed"), artifacts.new("models/one"):
        pytest.fail("the folder must not be given out")
    assert (artifacts.path("models/one") / "weights.bin").read_bytes() == b"first"


def test_first_of_two_writers_of_one_artifact_wins(artifacts: Artifacts) -> None:
    def write_slowly() -> None:
        with artifacts.new("models/one") as slow:
            (slow / "weights.bin").write_bytes(b"slow")
            with artifacts.new("models/one") as quick:
                (quick / "weights.bin").write_bytes(b"quick")

    with pytest.raises(ConflictError, match="another process"):
        write_slowly()
    assert (artifacts.path("models/one") / "weights.bin").read_bytes() == b"quick"
    assert staged(artifacts) == []


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../elsewhere", "models/../..", "models/../../elsewhere", "/etc/passwd"]
)
def test_key_that_leaves_the_folder_is_refused(artifacts: Artifacts, key: str) -> None:
    with pytest.raises(ConflictError, match="not a path inside"):
        artifacts.path(key)


def test_key_that_leaves_the_folder_through_a_link_is_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    (artifacts.root / "link").symlink_to(tmp_path)
    with pytest.raises(ConflictError, match="not a path inside"):
        artifacts.path("link/elsewhere")


def test_full_disk_is_a_capacity_error_and_leaves_nothing(small_disk: Path) -> None:
    artifacts = Artifacts(small_disk / "artifacts")
    with pytest.raises(CapacityError, match="disk is full") as caught, artifacts.new("models/one") as folder:
        (folder / "weights.bin").write_bytes(b"x" * 1_000_000)
    assert caught.value.hint is not None
    assert not artifacts.path("models/one").exists()
    assert staged(artifacts) == []
    with artifacts.new("models/small") as folder:
        (folder / "weights.bin").write_bytes(b"x" * 100_000)
    assert folder_bytes(artifacts.path("models/small")) == 100_000


def test_disk_that_is_full_before_the_first_file_is_a_capacity_error(small_disk: Path) -> None:
    artifacts = Artifacts(small_disk / "artifacts")
    with suppress(OSError):
        for number in range(20):
            (small_disk / str(number)).touch()
    with pytest.raises(CapacityError, match="disk is full"), artifacts.new("models/one"):
        pytest.fail("there is no folder to give out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_no_space_for_a_write_is_a_capacity_error(artifacts: Artifacts) -> None:
    with pytest.raises(CapacityError, match="disk is full"), artifacts.new("models/one"):
        Path("/dev/full").write_bytes(b"x")
    assert not artifacts.path("models/one").exists()


def test_other_errors_of_the_system_stay_as_they_are(artifacts: Artifacts) -> None:
    with pytest.raises(FileNotFoundError), artifacts.new("models/one") as folder:
        (folder / "missing" / "weights.bin").write_bytes(b"x")


def test_removed_artifact_is_gone_and_its_key_free(artifacts: Artifacts) -> None:
    for content in (b"first", b"second"):
        with artifacts.new("models/one") as folder:
            (folder / "weights.bin").write_bytes(content)
        artifacts.remove("models/one")
        assert not artifacts.path("models/one").exists()
    artifacts.remove("models/one")
    assert staged(artifacts) == []


def test_hashes_cover_every_file_and_tell_what_changed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    expected = file_hashes(tmp_path)
    assert list(expected) == ["a.txt", "b.txt", "deep/c.txt"]
    assert expected["a.txt"] == file_hash(tmp_path / "a.txt")
    assert folder_bytes(tmp_path) == sum(map(len, expected))
    check_hashes(tmp_path, expected)
    (tmp_path / "a.txt").write_text("A.txt")
    (tmp_path / "deep" / "c.txt").unlink()
    with pytest.raises(IntegrityError, match="not the recorded ones") as caught:
        check_hashes(tmp_path, expected)
    assert caught.value.problems == ("a.txt has changed", "deep/c.txt is missing")


def test_hash_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert file_hash(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_full_disk_under_safetensors_is_seen_as_one(tmp_path: Path) -> None:
    """Its own error has no number: only its text says what the system said."""
    from safetensors import SafetensorError

    with pytest.raises(DiskFullError, match="disk is full"), full_disk_is_an_error(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), full_disk_is_an_error(tmp_path):
        raise SafetensorError("Error while deserializing header")
