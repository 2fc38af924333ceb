"""What endpoints are to be told: written in the transaction that marks a run's end as announced, and kept until done.

Whoever ends a run (a worker process, the server, the command line) only writes its status. What ended and is not
announced yet is found here by comparing two tables, so that no end is missed or announced twice, whatever dies when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from luthier.records.run import FINISHED
from luthier.records.webhook import EventType, WebhookDelivery, WebhookEndpoint
from luthier.store.collection import Collection
from luthier.store.database import Database
from luthier.store.tables import announcements, objects, runs

ENDPOINT, DELIVERY = "webhook endpoint", "webhook delivery"
NewDelivery = Callable[[WebhookEndpoint], WebhookDelivery]


@dataclass(frozen=True)
class Ended:
    """A run that has ended and is not announced. ``finished_at`` has all digits of the column."""

    run_id: str
    project: str
    finished_at: float


class Outbox:
    """Endpoints, and the deliveries to them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.endpoints = Collection(database, ENDPOINT, WebhookEndpoint)
        self.deliveries = Collection(database, DELIVERY, WebhookDelivery)

    def unannounced(self, limit: int = 100) -> list[Ended]:
        """Return runs that have ended since their last announcement, the oldest end first."""
        query = (
            sa.select(runs.c.id, runs.c.project, runs.c.finished_at)
            .join(announcements, announcements.c.run_id == runs.c.id, isouter=True)
            .where(runs.c.status.in_(FINISHED), runs.c.finished_at.is_not(None))
            .where(announcements.c.run_id.is_(None) | (announcements.c.finished_at != runs.c.finished_at))
            .order_by(runs.c.finished_at)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [Ended(*row) for row in connection.execute(query)]

    def announce(self, ended: Ended, type: EventType | None, new: NewDelivery) -> bool:
        """Mark an end as announced, and keep a delivery for every endpoint of the project that wants to know.

        Returns whether this call did it: False where another process was first, or the run goes on again.
        """
        still = sa.select(runs.c.id).where(runs.c.id == ended.run_id, runs.c.finished_at == ended.finished_at)
        known = sa.select(announcements.c.finished_at).where(announcements.c.run_id == ended.run_id)
        with self._database.write() as connection:
            before = connection.execute(known).scalar()
            if before == ended.finished_at or connection.execute(still).first() is None:
                return False
            if before is None:
                change: sa.Insert | sa.Update = sa.insert(announcements).values(run_id=ended.run_id)
            else:
                change = sa.update(announcements).where(announcements.c.run_id == ended.run_id)
            connection.execute(change.values(finished_at=ended.finished_at))
            for endpoint in _endpoints(connection, ended.project):
                if type in endpoint.event_types and endpoint.disabled is None:
                    self.deliveries.add_in(connection, new(endpoint))
        return True

    def claim(
        self, moment: int, lease_seconds: int, busy: Mapping[str, int], at_most: int
    ) -> list[tuple[WebhookEndpoint, WebhookDelivery]]:
        """Take deliveries that are due, the oldest first; nobody else gets them before the lease ends.

        Args:
            moment: Now, in Unix seconds.
            lease_seconds: How long an attempt may take.
            busy: How many attempts are under way for an endpoint.
            at_most: How many attempts an endpoint gets at once.
        """
        due = sa.and_(
            objects.c.kind == DELIVERY,
            objects.c.status == "pending",
            objects.c.record["next_attempt_at"].as_integer() <= moment,
        )
        with self._database.read() as connection:
            parents = connection.execute(sa.select(objects.c.parent).where(due).distinct()).scalars().all()
        claimed: list[tuple[WebhookEndpoint, WebhookDelivery]] = []
        for parent in parents:
            room = at_most - busy.get(parent, 0)
            if room > 0:
                claimed += self._claim_of(parent, due, room, moment + lease_seconds)
        return claimed

    def _claim_of(
        self, parent: str, due: sa.ColumnElement[bool], limit: int, until: int
    ) -> list[tuple[WebhookEndpoint, WebhookDelivery]]:
        query = sa.select(objects.c.record).where(due, objects.c.parent == parent)
        its_endpoint = sa.select(objects.c.record).where(objects.c.kind == ENDPOINT, objects.c.id == parent)
        with self._database.write() as connection:
            record = connection.execute(its_endpoint).scalar()
            if record is None:
                return []
            endpoint = WebhookEndpoint.model_validate(record)
            found = connection.execute(query.order_by(objects.c.sequence).limit(limit)).scalars().all()
            taken = [WebhookDelivery.model_validate(one).model_copy(update={"next_attempt_at": until}) for one in found]
            for delivery in taken:
                change = sa.update(objects).where(objects.c.id == delivery.id)
                connection.execute(change.values(record=delivery.model_dump(mode="json")))
        return [(endpoint, delivery) for delivery in taken]

    def remove_endpoint(self, project: str, id: str) -> None:
        """Delete an endpoint and its deliveries.

        Raises:
            NotFoundError: the project has none of that id.
        """
        self.endpoints.remove(project, id)
        of_endpoint = sa.and_(objects.c.kind == DELIVERY, objects.c.project == project, objects.c.parent == id)
        with self._database.write() as connection:
            connection.execute(sa.delete(objects).where(of_endpoint))

    def counts(self) -> dict[str, int]:
        """Return how many deliveries of all projects there are by status."""
        query = sa.select(objects.c.status, sa.func.count()).where(objects.c.kind == DELIVERY)
        with self._database.read() as connection:
            rows = connection.execute(query.group_by(objects.c.status))
            return {str(status): int(number) for status, number in rows}


def _endpoints(connection: sa.Connection, project: str) -> list[WebhookEndpoint]:
    query = sa.select(objects.c.record).where(objects.c.kind == ENDPOINT, objects.c.project == project)
    return [WebhookEndpoint.model_validate(one) for one in connection.execute(query).scalars()]
