"""What a workflow sees of the run that it executes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from luthier.errors import RunStopped
from luthier.jobs.ending import stopped_on_request
from luthier.records.run import EventLevel, Run, RunRequest
from luthier.store.store import Store


class RunContext:
    """A run being executed: its store, its folder, and its voice.

    ``request`` is set from another thread when a person asks the run to pause or cancel; ``leaving`` when the process
    is to end, so that the run goes back into the queue.
    """

    def __init__(self, store: Store, run: Run, leaving: Event | None = None) -> None:
        self.store = store
        self.run = run
        self.request: RunRequest | None = run.request
        self.leaving = leaving or Event()
        self._later_attempt = run.attempts > 1

    @property
    def folder(self) -> Path:
        """The folder of the run's own files."""
        return self.store.run_folder(self.run.id)

    def say(self, message: str, *, level: EventLevel = "info", data: dict[str, Any] | None = None) -> None:
        """Add a message to the run's events."""
        self.store.runs.add_event(self.run.id, message, level=level, data=data)

    def metrics(self, message: str, data: dict[str, Any]) -> None:
        """Add measured numbers to the run's events."""
        self.store.runs.add_event(self.run.id, message, type="metrics", data=data)

    def progress(self, message: str, done: int, total: int) -> None:
        """Say how far a stage has come."""
        self.store.runs.add_event(self.run.id, message, type="progress", data={"done": done, "total": total})

    def came_forward(self) -> None:
        """Say that the run would go on behind where it began this time: earlier deaths do not count any more."""
        if self._later_attempt and self.run.owner is not None:
            self._later_attempt = False
            self.store.runs.forget_attempts(self.run.id, self.run.owner)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Enclose a stage of the run: its begin, its end and its seconds become events; a request stops it before."""
        self.stop_if_asked()
        started = time.monotonic()
        self.store.runs.add_event(self.run.id, name, type="stage", data={"stage": name})
        yield
        seconds = round(time.monotonic() - started, 3)
        message = f"{name}: {seconds:.1f} s"
        self.store.runs.add_event(self.run.id, message, type="stage", data={"stage": name, "seconds": seconds})

    def stop_if_asked(self) -> None:
        """End the run here where a person asked for it, or where its process is to end.

        Raises:
            RunStopped: it was asked to pause or cancel, or goes back into the queue.
        """
        if self.request:
            raise stopped_on_request(self.run.id, self.request)
        if self.leaving.is_set():
            raise RunStopped("The process that ran it is ending; the run goes back into the queue.")
