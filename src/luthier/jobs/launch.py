"""Puts a run into the queue, starts a process for it, and follows what it says until it ends."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.jobs.worker import is_dead
from luthier.records.run import Run, RunEvent, RunKind
from luthier.store.store import Store

POLL_SECONDS = 0.1
LOG_FILE = "log.txt"
OnEvent = Callable[[RunEvent], None]


def submit(store: Store, kind: RunKind, config: dict[str, Any]) -> Run:
    """Put a run into the queue and return it."""
    run_id = f"{kind}-{time.strftime('%y%m%d', time.gmtime())}-{secrets.token_hex(4)}"
    return store.runs.add(run_id, kind, config)


def start(store: Store, run_id: str) -> subprocess.Popen[bytes]:
    """Start a process that executes a run, and outlives this one. Its output goes to the run's log."""
    command = [sys.executable, "-m", "luthier.jobs.worker", "--home", str(store.home), "--run", run_id]
    with log_path(store, run_id).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def log_path(store: Store, run_id: str) -> Path:
    """Return the file that takes what a run's processes print."""
    return store.run_folder(run_id) / LOG_FILE


def follow(store: Store, run_id: str, on_event: OnEvent | None = None, *, after: int = 0) -> Run:
    """Pass on a run's events until it ends or pauses, and return it.

    A run whose process died is started again, as often as the queue allows.
    """
    process: subprocess.Popen[bytes] | None = None
    while True:
        run = store.runs.get(run_id)
        for event in store.runs.events(run_id, after=after):
            after = event.sequence
            if on_event:
                on_event(event)
        if run.is_finished or run.status == "paused":
            if process:
                process.wait()
            return run
        gone = run.status == "running" and run.owner is not None and is_dead(run.owner)
        if (run.status == "queued" or gone) and (process is None or process.poll() is not None):
            process = start(store, run_id)
        time.sleep(POLL_SECONDS)
