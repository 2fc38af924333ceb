"""Starts a process for every run that waits, a few at a time, for as long as the service runs."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Sequence

from luthier.jobs.launch import WORKER, start
from luthier.jobs.worker import WORKFLOWS, is_dead
from luthier.store.store import Store

POLL_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
HAND_BACK_SECONDS = 60.0

log = logging.getLogger("luthier.jobs")


class Supervisor:
    """A thread that watches the queue.

    Args:
        store: Whose queue.
        processes: How many runs may be executed at once.
        worker: The command line of a worker, see :func:`luthier.jobs.launch.start`.
    """

    def __init__(self, store: Store, processes: int = 1, worker: Sequence[str] = WORKER) -> None:
        self._store = store
        self._processes = processes
        self._worker = worker
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it watches."""
        return self._thread.is_alive()

    def stop(self, seconds: float = HAND_BACK_SECONDS) -> None:
        """Stop watching; running processes hand their runs back at the next safe point, or are killed in the end."""
        self._stop.set()
        self._thread.join()
        end = time.monotonic() + seconds
        for process in self._running.values():
            process.terminate()
        for run_id, process in self._running.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning(
                    "run %s did not come to a safe point within %g seconds; killing its process", run_id, seconds
                )
                process.kill()
                process.wait()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self._reap()
                self._fill()
            except Exception:  # a database that is busy or a full disk must not end the supervision
                log.exception("the queue could not be watched; trying again")

    def _reap(self) -> None:
        for run_id, process in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[run_id]
            self._failures[run_id] = self._failures.get(run_id, 0) + 1
            wait = min(LONGEST_WAIT_SECONDS, 2.0 ** self._failures[run_id])
            self._not_before[run_id] = time.monotonic() + (wait if process.returncode else 0.0)

    def _fill(self) -> None:
        if len(self._running) >= self._processes:
            return
        for run in self._store.runs.waiting(tuple(WORKFLOWS), is_dead):
            if run.id in self._running or time.monotonic() < self._not_before.get(run.id, 0.0):
                continue
            self._running[run.id] = start(self._store, run.id, self._worker)
            if len(self._running) >= self._processes:
                return
