"""What Linux says of the processor."""

from __future__ import annotations

from pathlib import Path


def cpu_line(*names: str) -> str:
    """Return what ``/proc/cpuinfo`` says of the first processor under one of some names; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")


def cpu_flags() -> str:
    """Return the names of the instruction sets that it has, as x86 and ARM list them."""
    return cpu_line("flags", "Features")
