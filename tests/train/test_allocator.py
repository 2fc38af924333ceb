"""Memory is kept while training goes on, and given back after it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages are counted, all of one size
from contextlib import nullcontext
from luthier.train.engine.allocator import freed_memory_kept

def page_faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        for tensor in [torch.ones(2_000_000) for _ in range(8)]:
            del tensor
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

usual = page_faults(10)
with freed_memory_kept():
    page_faults(2)
    kept, during = page_faults(10), resident()
print(usual, kept, during - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_and_given_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    usual, kept, returned = map(int, done.stdout.split())
    pages = 8 * 8_000_000 // 4096  # of one round
    assert usual > pages
    assert kept < pages // 10
    assert returned > pages // 2
