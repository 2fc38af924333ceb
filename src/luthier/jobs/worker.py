"""The process that executes runs: ``python -m luthier.jobs.worker --home HOME [--run ID]``.

It takes a run from the queue, renews the lease while it works, and calls the run's workflow by name. Whatever
happens, the run's row says so: success, pause, cancellation, an expected error, an unexpected one with its
traceback in the run's log. Killed, it leaves a lease that ends, and the run is taken up by the next process. Asked to
end (SIGTERM), it hands its run back to the queue at the next safe point.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from luthier.errors import ConflictError, LuthierError
from luthier.jobs.context import RunContext
from luthier.jobs.ending import end_with_error
from luthier.records.run import Run, RunKind, RunRequest
from luthier.store.artifacts import full_disk_is_an_error
from luthier.store.store import Store

LEASE_SECONDS = 30.0
RENEW_SECONDS = 0.5
WORKFLOWS: dict[RunKind, str] = {
    "train": "luthier.workflows.training:execute",
    "evaluate": "luthier.workflows.evaluation:execute",
}

log = logging.getLogger("luthier.jobs")


def this_owner() -> str:
    """Return the name of this process as an owner of runs: host, process id and start time."""
    return f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time():.2f}"


def is_dead(owner: str) -> bool:
    """Return whether an owner is a process of this host that has ended (its parent may not have noticed yet)."""
    host, pid, started = owner.split("/")
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - float(started)) > 1.0
    except psutil.NoSuchProcess:
        return True


def work(store: Store, run_id: str | None = None, leaving: threading.Event | None = None) -> bool:
    """Take one run (a certain one, if named) and execute it here; return whether there was one.

    Once ``leaving`` is set, the run goes back into the queue at its next safe point.
    """
    owner = this_owner()
    run = store.runs.claim(owner, LEASE_SECONDS, is_dead, run_id, kinds=WORKFLOWS)
    if run is None:
        return False
    if run.attempts > 1:
        message = f"The process before this one ended early; attempt {run.attempts} goes on from the last checkpoint."
        store.runs.add_event(run.id, message, level="warning")
    context = RunContext(store, run, leaving)
    stop_renewing = threading.Event()
    renewer = threading.Thread(target=_renew, args=(store, run, owner, context, stop_renewing), daemon=True)
    renewer.start()
    try:
        _execute(store, run, owner, context)
    finally:
        stop_renewing.set()
        renewer.join()
    return True


def _execute(store: Store, run: Run, owner: str, context: RunContext) -> None:
    try:
        with full_disk_is_an_error(store.home):
            result = _workflow(run.kind)(context)
        store.runs.finish(run.id, owner, "succeeded", result=result)
    except Exception as error:  # noqa: BLE001 - the one place where anything at all must become a status
        if not isinstance(error, LuthierError):
            traceback.print_exc()
        end_with_error(store, run, owner, error, context.request)


def _workflow(kind: RunKind) -> Callable[[RunContext], dict[str, Any]]:
    module, function = WORKFLOWS[kind].split(":")
    workflow: Callable[[RunContext], dict[str, Any]] = getattr(importlib.import_module(module), function)
    return workflow


def _renew(store: Store, run: Run, owner: str, context: RunContext, stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        try:
            context.request = _renew_once(store, run, owner)
        except Exception:  # ending here would lose the lease while the run goes on
            log.exception("the lease of run %s could not be renewed; trying again", run.id)


def _renew_once(store: Store, run: Run, owner: str) -> RunRequest | None:
    """Prolong the lease; end this process where the run has another owner by now."""
    try:
        return store.runs.renew(run.id, owner, LEASE_SECONDS)
    except ConflictError:
        if store.runs.get(run.id).owner is None:  # it has just ended
            return None
        log.error("run %s was taken over by another process; stopping", run.id)
        os._exit(3)


def main() -> None:
    """Run the worker's command line."""
    parser = argparse.ArgumentParser(prog="python -m luthier.jobs.worker", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--run", help="execute this run only, then end")
    parser.add_argument("--poll-seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    store = Store(arguments.home)
    store.artifacts.clear_stale_staging()
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    if arguments.run:
        work(store, arguments.run, leaving)
        return
    while not leaving.is_set():
        if not work(store, leaving=leaving):
            leaving.wait(arguments.poll_seconds)


if __name__ == "__main__":
    main()
