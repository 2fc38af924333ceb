"""How much memory there is, where a machine, a container or a service has a limit as the kernel writes it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from luthier.llm.machine_memory import machine_memory
from luthier.serve.engine_memory import DEFAULT_SHARE, default_budget

MIB = 2**20


def write_group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon {used - cached}\nactive_file {cached // 2}\ninactive_file {cached // 2}\n"
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "cgroup"
    file.write_text("0::/\n")
    return file


def test_without_a_limit_the_machine_counts(tmp_path: Path, own: Path) -> None:
    write_group(tmp_path / "groups", "max", 10 * MIB, 0)
    for groups in (tmp_path / "groups", tmp_path / "missing"):
        found = machine_memory(groups, own)
        assert found.total_bytes == psutil.virtual_memory().total
        assert 0 < found.free_bytes <= found.total_bytes


def test_a_container_has_what_it_may_use_and_files_that_are_kept_are_free(tmp_path: Path, own: Path) -> None:
    write_group(tmp_path / "groups", str(64 * MIB), 40 * MIB, 10 * MIB)
    found = machine_memory(tmp_path / "groups", own)
    assert (found.total_bytes, found.free_bytes) == (64 * MIB, 34 * MIB)
    write_group(tmp_path / "groups", str(32 * MIB), 40 * MIB, 0)  # it was lowered
    assert machine_memory(tmp_path / "groups", own).free_bytes == 0


def test_a_service_has_no_more_than_the_groups_around_it(tmp_path: Path, own: Path) -> None:
    own.write_text("9:name=systemd:/\n0::/system.slice/luthier.service\n")
    write_group(tmp_path / "groups" / "system.slice", str(48 * MIB), 40 * MIB, 0)
    write_group(tmp_path / "groups" / "system.slice" / "luthier.service", str(32 * MIB), 8 * MIB, 0)
    found = machine_memory(tmp_path / "groups", own)
    assert (found.total_bytes, found.free_bytes) == (32 * MIB, 8 * MIB)


def test_engines_may_hold_a_share_of_what_there_is() -> None:
    assert default_budget() == int(machine_memory().total_bytes * DEFAULT_SHARE)
