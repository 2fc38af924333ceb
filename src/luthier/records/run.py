"""Runs: work in the queue, its status, and what it said on the way."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from luthier.records.access import DEFAULT_PROJECT
from luthier.records.record import Record
from luthier.records.stored import Metadata

RunKind = Literal["train", "evaluate", "batch", "eval_run"]
RunStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
RunRequest = Literal["pause", "cancel"]
EventLevel = Literal["info", "warning", "error"]

FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
RESUMABLE: frozenset[str] = frozenset({"paused", "failed"})  # to cancel a run is to stop it for good
CANCELLED_BY_EXECUTION: frozenset[RunKind] = frozenset({"batch"})  # whoever executes it makes files of what it has


class Run(Record):
    """A piece of work.

    ``config`` is the workflow's own record as JSON; ``result`` likewise once it succeeded. ``owner`` names the
    process that holds the lease, which ends at ``lease_until`` unless it is renewed. ``attempts`` counts how often
    a process took the run up. ``request`` is what a person asked of a running one, or of one that has to be taken up
    once more to be cancelled (``CANCELLED_BY_EXECUTION``).
    """

    id: str
    kind: RunKind
    status: RunStatus
    project: str = DEFAULT_PROJECT
    metadata: Metadata | None = None
    config: dict[str, Any]
    result: dict[str, Any] | None = None
    error: str | None = None
    request: RunRequest | None = None
    owner: str | None = None
    lease_until: datetime | None = None
    attempts: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen to it any more by itself."""
        return self.status in FINISHED

    @property
    def may_go_on(self) -> bool:
        """Whether it waits, runs or can be resumed, so that it needs what it was made from."""
        return not self.is_finished or self.status in RESUMABLE


class RunEvent(Record):
    """One thing that a run said. ``type`` is ``message``, ``progress``, ``metrics`` or ``stage``."""

    run_id: str
    sequence: int
    created_at: datetime
    level: EventLevel = "info"
    type: Literal["message", "progress", "metrics", "stage"] = "message"
    message: str
    data: dict[str, Any] = Field(default_factory=dict)
