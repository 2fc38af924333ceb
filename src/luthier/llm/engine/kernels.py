"""Compiles ``kernels.c`` with the machine's C compiler, once, and keeps the library in the user's cache.

A machine without a compiler computes the same by torch. ``CC`` names another compiler, as everywhere; ``CC=false``
does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs
import torch

from luthier.llm.engine.layer_operations import FINER, INT8_MAX, INT16_MAX, INT16_NORM, LEAST
from luthier.llm.engine.processor import cpu_flags

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
BITS = {torch.bfloat16: 16, torch.float32: 32}
# The threads of torch's own OpenMP are used: the library is linked with none, and finds the one that is loaded.
FLAG_SETS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
INTEGERS = (f"-DINT8_MOST={INT8_MAX}.0f", f"-DINT16_MOST={INT16_MAX}.0f", f"-DINT16_NORM={INT16_NORM}.0f")
NUMBERS = (*INTEGERS, f"-DFINER={FINER}", f"-DLEAST={LEAST}f")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-Wno-psabi", *NUMBERS)
COMPILE_SECONDS = 120


@cache
def find_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the kernels for numbers of a type, or None where they cannot be had."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if dtype not in BITS or compiler is None:
        return None
    for flags in FLAG_SETS:
        try:
            found = _load([*compiler.split(), *FLAGS, *flags, f"-DNUMBER_BITS={BITS[dtype]}"])
            if flags != FLAG_SETS[0]:
                log.info("the kernels for training are made without %s: they are slower", " ".join(FLAG_SETS[0]))
            return found
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or error
            log.debug("no kernels by %s %s: %s", compiler, " ".join(flags), detail)
    log.info("no C compiler that makes the kernels for training: torch does it all, more slowly")
    return None


def _load(command: list[str]) -> ctypes.CDLL:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS)
    key = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), version.stdout, repr(command).encode(), _processor())))
    kept = Path(platformdirs.user_cache_dir("luthier")) / "kernels" / f"{key.hexdigest()[:32]}.so"
    if kept.is_file():
        try:
            return ctypes.CDLL(str(kept))
        except OSError as error:  # half written, say, as a machine went down: it is made again, and takes its place
            log.info("the kept kernels cannot be loaded, and are compiled again: %s", error)
    with TemporaryDirectory(prefix="luthier-kernels-") as folder:
        built, library = str(Path(folder) / "kernels.o"), Path(folder) / "kernels.so"
        for step in ([*command, "-c", str(SOURCE), "-o", built], [command[0], "-shared", built, "-o", str(library)]):
            subprocess.run(step, capture_output=True, check=True, text=True, timeout=COMPILE_SECONDS)
        loaded = ctypes.CDLL(str(library))
        _keep(library, kept)
    return loaded


def _keep(library: Path, kept: Path) -> None:
    """Put a library that was loaded into the cache; without a cache it is made again next time."""
    staged = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with staged.open("wb") as file:
            file.write(library.read_bytes())
            os.fsync(file.fileno())
        staged.replace(kept)
    except OSError as error:
        log.debug("the kernels are not kept: %s", error)
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def _processor() -> bytes:
    """Return what tells processors apart that cannot run each other's code."""
    return f"{platform.machine()} {platform.processor()} {cpu_flags()}".encode()
