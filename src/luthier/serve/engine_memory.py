"""How much memory engines may hold, and what one is expected to need before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luthier.llm.machine_memory import machine_memory

DEFAULT_SHARE = 0.7
LEAST_FREE_SHARE = 0.05
PROCESS_BYTES = 160 * 2**20  # measured: an engine without a model to speak of
BYTES_PER_FILE_BYTE = 4.0  # measured: the mapped file, and openvino's own copies of float16 weights
ENCODER_PROCESS_BYTES = 400 * 2**20  # measured: torch and transformers without a model to speak of
GIGABYTE = 2**30


@dataclass(frozen=True)
class MemoryNeed:
    """What an engine needs: ``least_bytes`` surely, ``expected_bytes`` with all copies that it may make."""

    least_bytes: int
    expected_bytes: int


def default_budget() -> int:
    """Return the share of the memory of this machine or container that engines may hold, in bytes."""
    return int(machine_memory().total_bytes * DEFAULT_SHARE)


def least_free() -> int:
    """Return the share of the memory of this machine or container for which idle engines are unloaded, in bytes."""
    return int(machine_memory().total_bytes * LEAST_FREE_SHARE)


def need_of(folder: Path, cache_gigabytes: int) -> MemoryNeed:
    """Return what an engine on a served model folder needs; nothing is known of a folder without ``model.gguf``.

    The cache fills as prompts come: right after loading an engine holds less.
    """
    try:
        size = (folder / "model.gguf").stat().st_size
    except OSError:
        return MemoryNeed(0, 0)
    cache = cache_gigabytes * GIGABYTE
    return MemoryNeed(size + PROCESS_BYTES, int(size * BYTES_PER_FILE_BYTE) + PROCESS_BYTES + cache)


def encoder_need(folder: Path) -> MemoryNeed:
    """Return what an encoder in a folder of safetensors needs: its weights in float32, and the texts of a step."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return MemoryNeed(size + ENCODER_PROCESS_BYTES, 2 * size + ENCODER_PROCESS_BYTES)
