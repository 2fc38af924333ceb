"""Puts a run into the queue, starts a process for it, and follows what it says until it ends."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from luthier.errors import EngineError
from luthier.jobs.worker import WORKFLOWS, is_dead
from luthier.records.access import DEFAULT_PROJECT
from luthier.records.record import Record
from luthier.records.run import Run, RunEvent, RunKind
from luthier.records.stored import Metadata
from luthier.store.store import Store

POLL_SECONDS = 0.1
WORKER = (sys.executable, "-m", "luthier.jobs.worker")
LOG_FILE = "log.txt"
# OpenMP's threads spin at every barrier, which is harmless alone and stops a run almost dead where another process (a
# server, say) wants the same cores: docs/measurements.md has both cases.
SHARES_ITS_CORES = {"GOMP_SPINCOUNT": "1000"}
OnEvent = Callable[[RunEvent], None]


def submit(
    store: Store,
    kind: RunKind,
    request: Record,
    *,
    project: str = DEFAULT_PROJECT,
    metadata: Metadata | None = None,
) -> Run:
    """Put a run into the queue and return it."""
    config = request.model_dump(mode="json")
    run_id = f"{kind}-{time.strftime('%y%m%d', time.gmtime())}-{secrets.token_hex(4)}"
    return store.runs.add(run_id, kind, config, project=project, metadata=metadata)


def start(store: Store, run_id: str, worker: Sequence[str] = WORKER) -> subprocess.Popen[bytes]:
    """Start a process that executes a run, and outlives this one. Its output goes to the run's log.

    ``worker`` is the command line to which ``--home HOME --run ID`` is added.
    """
    command = [*worker, "--home", str(store.home), "--run", run_id]
    environment = SHARES_ITS_CORES | os.environ
    with log_path(store, run_id).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def log_path(store: Store, run_id: str) -> Path:
    """Return the file that takes what a run's processes print."""
    return store.run_folder(run_id) / LOG_FILE


def follow(
    store: Store,
    run_id: str,
    on_event: OnEvent | None = None,
    *,
    after: int = 0,
    worker: Sequence[str] = WORKER,
) -> Run:
    """Pass on a run's events until it ends or pauses, and return it.

    A run whose process died is started again, as often as the queue allows. One that the server process executes is
    waited for.

    Raises:
        EngineError: a process that was started for it ended before it took the run up.
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
        waits = run.kind in WORKFLOWS and (run.status == "queued" or _lost_its_process(run))
        if waits and (process is None or process.poll() is not None):
            if process and process.returncode and not store.runs.get(run_id).attempts:
                raise EngineError(
                    f"The process for run {run_id} ended with code {process.returncode} before it took the run up.",
                    hint=f"luthier run logs --output {run_id}",
                )
            process = start(store, run_id, worker)
        time.sleep(POLL_SECONDS)


def _lost_its_process(run: Run) -> bool:
    if run.status != "running" or run.owner is None or run.lease_until is None:
        return False
    return is_dead(run.owner) or run.lease_until < datetime.now(UTC)
