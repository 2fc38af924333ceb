"""How much memory processes hold."""

from __future__ import annotations

import psutil


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 for one that is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def family_resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and of all that it started."""
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return 0
    return resident_bytes(pid) + sum(resident_bytes(member.pid) for member in family)
