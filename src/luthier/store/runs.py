"""The queue: runs with leases, and the events that they leave.

A run is taken by one owner at a time: taking and renewing are single transactions, so that two servers on one
database never run the same job. An owner that does not renew its lease, or is seen to be dead, loses the run to
the next one, which goes on from the run's last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from luthier.errors import ConflictError, NotFoundError
from luthier.records.access import DEFAULT_PROJECT
from luthier.records.run import (
    CANCELLED_BY_EXECUTION,
    FINISHED,
    RESUMABLE,
    EventLevel,
    Run,
    RunEvent,
    RunKind,
    RunRequest,
    RunStatus,
)
from luthier.records.stored import Metadata, Page
from luthier.store.database import Database
from luthier.store.tables import run_events, runs

MAX_ATTEMPTS = 3
TIMES = ("created_at", "started_at", "finished_at", "lease_until")


class RunStore:
    """Runs and their events in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        run_id: str,
        kind: RunKind,
        config: dict[str, Any],
        *,
        project: str = DEFAULT_PROJECT,
        metadata: Metadata | None = None,
    ) -> Run:
        """Put a run into the queue."""
        row = {"id": run_id, "kind": kind, "status": "queued", "config": config, "attempts": 0}
        row |= {"project": project, "metadata": metadata}
        with self._database.write() as connection:
            connection.execute(sa.insert(runs).values(**row, created_at=time.time()))
        return self.get(run_id)

    def get(self, run_id: str, *, project: str | None = None) -> Run:
        """Return a run, of a certain project where one is named.

        Raises:
            NotFoundError: there is none of that id.
        """
        query = sa.select(runs).where(runs.c.id == run_id)
        if project is not None:
            query = query.where(runs.c.project == project)
        with self._database.read() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFoundError(f"There is no run {run_id!r}.", hint="luthier run list")
        return _run(row)

    def all(self, *, status: RunStatus | None = None, limit: int | None = 100) -> list[Run]:
        """Return runs, the newest first; with ``limit`` None all of them."""
        query = sa.select(runs).order_by(runs.c.created_at.desc(), runs.c.id).limit(limit)
        if status:
            query = query.where(runs.c.status == status)
        with self._database.read() as connection:
            return [_run(row) for row in connection.execute(query).mappings()]

    def page(
        self,
        project: str,
        kinds: Collection[RunKind],
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: dict[str, str] | None = None,
        no_metadata: bool = False,
    ) -> Page[Run]:
        """Return a part of a project's runs of some kinds, the newest first.

        Args:
            project: Whose.
            kinds: Which.
            after: The id of the last run of the page before.
            limit: How many at most.
            metadata: Only those with all of these labels.
            no_metadata: Only those without any.

        Raises:
            NotFoundError: there is no such run with the id ``after``.
        """
        query = sa.select(runs).where(runs.c.project == project, runs.c.kind.in_(kinds))
        if after is not None:
            self.get(after, project=project)
            # Compared in the database: a datetime has fewer digits than the column.
            last = sa.select(runs.c.created_at).where(runs.c.id == after).scalar_subquery()
            earlier = (runs.c.created_at == last) & (runs.c.id > after)
            query = query.where((runs.c.created_at < last) | earlier)
        wanted = (metadata or {}).items()
        found: list[Run] = []
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(runs.c.created_at.desc(), runs.c.id)).mappings()
            for row in rows:
                labels = row["metadata"] or {}
                if (no_metadata and labels) or any(labels.get(key) != value for key, value in wanted):
                    continue
                found.append(_run(row))
                if len(found) > limit:
                    break
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def claim(
        self,
        owner: str,
        lease_seconds: float,
        is_dead: Callable[[str], bool],
        run_id: str | None = None,
        *,
        kinds: Collection[RunKind] | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> Run | None:
        """Take the oldest run that waits, or whose owner is gone; None where there is none.

        ``run_id`` asks for one run, ``kinds`` for those of some kinds.

        A run whose owners died ``max_attempts`` times without coming forward (:meth:`forget_attempts`) is marked as
        failed instead of being taken again.
        """
        query = sa.select(runs).where(runs.c.status.in_(("queued", "running"))).order_by(runs.c.created_at)
        if run_id:
            query = query.where(runs.c.id == run_id)
        if kinds is not None:
            query = query.where(runs.c.kind.in_(kinds))
        with self._database.write() as connection:
            for row in connection.execute(query).mappings().all():
                if row["status"] == "running" and row["lease_until"] > time.time() and not is_dead(row["owner"]):
                    continue
                if row["attempts"] >= max_attempts:
                    message = f"The process that ran it died {max_attempts} times."
                    _finish(connection, row["id"], "failed", error=message)
                    continue
                _take(connection, row, owner, lease_seconds)
                taken = connection.execute(sa.select(runs).where(runs.c.id == row["id"])).mappings().one()
                return _run(taken)
        return None

    def renew(self, run_id: str, owner: str, lease_seconds: float) -> RunRequest | None:
        """Prolong a lease and return what a person asked of the run meanwhile.

        Raises:
            ConflictError: the run belongs to another owner by now; the caller must stop.
        """
        with self._database.write() as connection:
            mine = (runs.c.id == run_id) & (runs.c.owner == owner) & (runs.c.status == "running")
            changed = connection.execute(sa.update(runs).where(mine).values(lease_until=time.time() + lease_seconds))
            if changed.rowcount == 0:
                raise ConflictError(f"Run {run_id} is not held by {owner} any more.")
            return connection.execute(sa.select(runs.c.request).where(runs.c.id == run_id)).scalar()

    def finish(
        self,
        run_id: str,
        owner: str,
        status: RunStatus,
        *,
        result: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """End a run that this owner holds (``paused`` ends the hold, not the run).

        Raises:
            ConflictError: the run belongs to another owner by now.
        """
        with self._database.write() as connection:
            held_by = connection.execute(sa.select(runs.c.owner).where(runs.c.id == run_id)).scalar()
            if held_by != owner:
                raise ConflictError(f"Run {run_id} is not held by {owner} any more.")
            _finish(connection, run_id, status, result=result, error=error)

    def hand_back(self, run_id: str, owner: str) -> None:
        """Put a run that this owner holds back into the queue, as if it had not been taken up.

        Raises:
            ConflictError: the run belongs to another owner by now.
        """
        mine = (runs.c.id == run_id) & (runs.c.owner == owner)
        values = {"status": "queued", "owner": None, "lease_until": None, "attempts": runs.c.attempts - 1}
        with self._database.write() as connection:
            if connection.execute(sa.update(runs).where(mine).values(**values)).rowcount == 0:
                raise ConflictError(f"Run {run_id} is not held by {owner} any more.")

    def forget_attempts(self, run_id: str, owner: str) -> None:
        """Count the attempt that this owner is making as a run's first; nothing where the run is another's by now."""
        mine = (runs.c.id == run_id) & (runs.c.owner == owner) & (runs.c.status == "running")
        with self._database.write() as connection:
            connection.execute(sa.update(runs).where(mine).values(attempts=1))

    def waiting(
        self, kinds: Collection[RunKind], is_dead: Callable[[str], bool], *, to_cancel: bool = False
    ) -> list[Run]:
        """Return the runs that somebody should take up, the oldest first: queued, or left by an owner that is gone.

        ``to_cancel`` leaves out those that are not to be cancelled.
        """
        query = sa.select(runs).where(runs.c.status.in_(("queued", "running")), runs.c.kind.in_(kinds))
        if to_cancel:
            query = query.where(runs.c.request == "cancel")
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(runs.c.created_at)).mappings().all()
        return [
            _run(row)
            for row in rows
            if row["status"] == "queued" or row["lease_until"] < time.time() or is_dead(row["owner"])
        ]

    def unfinished(self) -> dict[tuple[str, str], int]:
        """Return how many runs of each kind and status there are that have not ended."""
        query = sa.select(runs.c.kind, runs.c.status, sa.func.count()).where(runs.c.status.not_in(FINISHED))
        with self._database.read() as connection:
            rows = connection.execute(query.group_by(runs.c.kind, runs.c.status))
            return {(kind, status): number for kind, status, number in rows}

    def request(self, run_id: str, request: RunRequest) -> Run:
        """Ask a run to pause or cancel: at once where nothing runs it, else at its next safe point.

        One that was taken up before and is of a kind that has to be executed to be cancelled
        (``CANCELLED_BY_EXECUTION``) waits in the queue for that.

        Raises:
            NotFoundError: there is none of that id.
            ConflictError: it is finished already (a failed one can be given up still), or waits to be cancelled and
                cannot be paused.
        """
        run = self.get(run_id)
        with self._database.write() as connection:
            row = connection.execute(sa.select(runs).where(runs.c.id == run_id)).mappings().one()
            if row["status"] in FINISHED and (row["status"], request) != ("failed", "cancel"):
                raise ConflictError(f"Run {run_id} has already {row['status']}.")
            if row["request"] == "cancel" and request == "pause":
                raise ConflictError(f"Run {run_id} waits to be cancelled; it cannot be paused.")
            if row["status"] == "running":
                connection.execute(sa.update(runs).where(runs.c.id == run_id).values(request=request))
            elif request == "cancel" and _needs_execution(row):
                waits = {"status": "queued", "request": request, "attempts": 0}
                connection.execute(sa.update(runs).where(runs.c.id == run_id).values(**waits))
            else:
                _finish(connection, run_id, "cancelled" if request == "cancel" else "paused")
        return self.get(run.id)

    def requeue(self, run_id: str) -> Run:
        """Put a paused or failed run back into the queue; it goes on from its last checkpoint.

        One that waits or runs is left as it is.

        Raises:
            NotFoundError: there is none of that id.
            ConflictError: it has succeeded, was cancelled, or waits to be.
        """
        run = self.get(run_id)
        if run.status == "queued" and run.request == "cancel":
            raise ConflictError(f"Run {run_id} waits to be cancelled; it cannot be resumed.")
        if run.is_finished and run.status not in RESUMABLE:
            raise ConflictError(f"Run {run_id} is {run.status}; only a paused or failed one can be resumed.")
        fresh = {"status": "queued", "request": None, "error": None, "attempts": 0, "finished_at": None}
        stopped = (runs.c.id == run_id) & runs.c.status.in_(RESUMABLE)
        with self._database.write() as connection:
            connection.execute(sa.update(runs).where(stopped).values(**fresh))
        return self.get(run_id)

    def add_event(
        self,
        run_id: str,
        message: str,
        *,
        type: str = "message",
        level: EventLevel = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        """Append an event to a run's history."""
        last = sa.select(sa.func.coalesce(sa.func.max(run_events.c.sequence), 0)).where(run_events.c.run_id == run_id)
        row = {"run_id": run_id, "level": level, "type": type, "message": message, "data": data or {}}
        with self._database.write() as connection:
            sequence = connection.execute(last).scalar_one() + 1
            connection.execute(sa.insert(run_events).values(**row, sequence=sequence, created_at=time.time()))

    def newest_events(self, run_id: str, *, before: int | None = None, limit: int = 20) -> Page[RunEvent]:
        """Return a part of a run's events, the newest first: those before a sequence number, where one is given."""
        query = sa.select(run_events).where(run_events.c.run_id == run_id)
        if before is not None:
            query = query.where(run_events.c.sequence < before)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(run_events.c.sequence.desc()).limit(limit + 1)).mappings().all()
        return Page(items=tuple(_event(row) for row in rows[:limit]), has_more=len(rows) > limit)

    def last_event(self, run_id: str, type: str) -> RunEvent | None:
        """Return the last event of a type; None where there is none."""
        query = sa.select(run_events).where(run_events.c.run_id == run_id, run_events.c.type == type)
        with self._database.read() as connection:
            row = connection.execute(query.order_by(run_events.c.sequence.desc()).limit(1)).mappings().first()
        return _event(row) if row else None

    def events(self, run_id: str, *, after: int = 0, type: str | None = None) -> list[RunEvent]:
        """Return a run's events behind a sequence number, the oldest first."""
        query = sa.select(run_events).where(run_events.c.run_id == run_id, run_events.c.sequence > after)
        if type:
            query = query.where(run_events.c.type == type)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(run_events.c.sequence)).mappings().all()
        return [_event(row) for row in rows]


def _needs_execution(row: sa.RowMapping) -> bool:
    """Return whether a run that nobody holds has to be taken up once more to be cancelled."""
    taken_up_before = row["started_at"] is not None and row["status"] not in FINISHED
    return taken_up_before and row["kind"] in CANCELLED_BY_EXECUTION


def _take(connection: sa.Connection, row: sa.RowMapping, owner: str, lease_seconds: float) -> None:
    now = time.time()
    values = {"status": "running", "owner": owner, "lease_until": now + lease_seconds, "error": None}
    connection.execute(
        sa.update(runs)
        .where(runs.c.id == row["id"])
        .values(**values, attempts=row["attempts"] + 1, started_at=row["started_at"] or now)
    )


def _finish(
    connection: sa.Connection,
    run_id: str,
    status: RunStatus,
    *,
    result: dict[str, Any] | None = None,
    error: str | None = None,
) -> None:
    values = {"status": status, "result": result, "error": error, "owner": None, "lease_until": None, "request": None}
    finished_at = time.time() if status in FINISHED else None
    connection.execute(sa.update(runs).where(runs.c.id == run_id).values(**values, finished_at=finished_at))


def _event(row: sa.RowMapping) -> RunEvent:
    return RunEvent.model_validate({**row, "created_at": _moment(row["created_at"])})


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _run(row: sa.RowMapping | dict[str, Any]) -> Run:
    times = {key: _moment(row[key]) if row[key] is not None else None for key in TIMES}
    return Run.model_validate({**row, **times})
