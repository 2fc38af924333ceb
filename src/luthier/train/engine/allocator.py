"""Memory that stays with the process while it trains.

Every step frees hundreds of megabytes and wants them back. glibc returns much of it to the system, and new pages cost
as much as a pass over them: up to a tenth of a short step on two cores (docs/measurements.md).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_PIECE = 32 << 20  # bytes; glibc takes no more as a threshold, and maps what is larger for itself
NEVER = 2**31 - 1
USUAL = 2 * LARGEST_PIECE  # what glibc comes to by itself, where such pieces are freed


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc's allocator keep what is freed until the end; elsewhere nothing is changed."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_PIECE)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, USUAL)
        libc.malloc_trim(0)
