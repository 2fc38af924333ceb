"""How much memory this machine has, or the container or service (cgroup v2) that this process runs in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
GIVEN_BACK = ("active_file", "inactive_file")  # what the kernel keeps of files, until somebody needs the room


@dataclass(frozen=True)
class MachineMemory:
    """What there is in all, and what a new process can have."""

    total_bytes: int
    free_bytes: int


def machine_memory(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> MachineMemory:
    """Return the memory of this machine, and no more than any group above this process may use.

    Args:
        groups: Where the kernel shows the groups.
        own_group: The file that says which group this process is in.
    """
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for group in _groups(groups, own_group):
        limit = _number(group / "memory.max")
        if limit is not None:
            held = (_number(group / "memory.current") or 0) - _given_back(group / "memory.stat")
            total, free = min(total, limit), min(free, limit - held)
    return MachineMemory(total, max(free, 0))


def _groups(groups: Path, own_group: Path) -> Iterator[Path]:
    """Yield the folder of all groups, which a container sees as its own, and those down to this process's."""
    yield groups
    written = _text(own_group)
    own = next((line.removeprefix("0::/") for line in written.splitlines() if line.startswith("0::/")), "")
    folder = groups
    for name in filter(None, own.split("/")):
        folder /= name
        yield folder


def _given_back(stat: Path) -> int:
    rows = (line.split() for line in _text(stat).splitlines())
    return sum(int(value) for name, value in rows if name in GIVEN_BACK)


def _number(file: Path) -> int | None:
    """Return what a file says; none where it is not there, or says that there is no limit."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text("ascii")
    except OSError:
        return ""
