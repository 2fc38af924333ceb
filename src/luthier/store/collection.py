"""Things that the API keeps for projects: one table, one class, and no way to reach a thing without its project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeVar

import sqlalchemy as sa

from luthier.errors import NotFoundError
from luthier.records.stored import Page, Stored
from luthier.store.database import Database
from luthier.store.tables import objects

T = TypeVar("T", bound=Stored)
Order = Literal["asc", "desc"]
SEARCHED = ("parent", "status", "model")
BLOCK = 500


class Collection(Generic[T]):
    """All things of one kind.

    Args:
        database: Where they are.
        kind: The kind's name, as users read it in errors.
        record: The kind's class.
    """

    def __init__(self, database: Database, kind: str, record: type[T]) -> None:
        self._database = database
        self._kind = kind
        self._record = record

    def add(self, thing: T) -> T:
        """Keep a new thing, and return it."""
        with self._database.write() as connection:
            self.add_in(connection, thing)
        return thing

    def add_in(self, connection: sa.Connection, thing: T) -> None:
        """Keep a new thing as a part of a transaction."""
        connection.execute(sa.insert(objects).values(kind=self._kind, **_row(thing)))

    def get(self, project: str, id: str) -> T:
        """Return a thing of a project.

        Raises:
            NotFoundError: the project has none of that id (another one may).
        """
        with self._database.read() as connection:
            record = connection.execute(sa.select(objects.c.record).where(self._is(project, id))).scalar()
        if record is None:
            raise self._missing(id)
        return self._record.model_validate(record)

    def change(self, project: str, id: str, change: Callable[[T], T]) -> T:
        """Replace a thing by what ``change`` makes of it; nobody else changes it meanwhile.

        Raises:
            NotFoundError: the project has none of that id.
        """
        with self._database.write() as connection:
            record = connection.execute(sa.select(objects.c.record).where(self._is(project, id))).scalar()
            if record is None:
                raise self._missing(id)
            changed = change(self._record.model_validate(record))
            connection.execute(sa.update(objects).where(self._is(project, id)).values(**_row(changed)))
        return changed

    def remove(self, project: str, id: str) -> T:
        """Delete a thing, and return what it was.

        Raises:
            NotFoundError: the project has none of that id.
        """
        with self._database.write() as connection:
            record = connection.execute(sa.select(objects.c.record).where(self._is(project, id))).scalar()
            if record is None:
                raise self._missing(id)
            connection.execute(sa.delete(objects).where(self._is(project, id)))
        return self._record.model_validate(record)

    def page(
        self,
        project: str,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        parent: str | None = None,
        status: str | None = None,
        model: str | None = None,
        fields: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        no_metadata: bool = False,
    ) -> Page[T]:
        """Return a part of a project's things in the order in which they came.

        Args:
            project: Whose.
            after: The id of the last thing of the page before.
            limit: How many at most.
            order: The newest first (desc), or the oldest.
            parent: Only those of this parent; likewise ``status`` and ``model``.
            status: See there.
            model: See there.
            fields: Only those whose record has these texts.
            metadata: Only those with all of these labels.
            no_metadata: Only those without any, whatever ``metadata`` says.

        Raises:
            NotFoundError: there is no thing with the id ``after``.
        """
        query = sa.select(objects.c.record).where(objects.c.kind == self._kind, objects.c.project == project)
        for column, wanted in ((objects.c.parent, parent), (objects.c.status, status), (objects.c.model, model)):
            if wanted is not None:
                query = query.where(column == wanted)
        for name, value in (fields or {}).items():
            query = query.where(objects.c.record[name].as_string() == value)
        with self._database.read() as connection:
            if after is not None:
                place = connection.execute(sa.select(objects.c.sequence).where(self._is(project, after))).scalar()
                if place is None:
                    raise self._missing(after)
                query = query.where(objects.c.sequence < place if order == "desc" else objects.c.sequence > place)
            direction = objects.c.sequence.desc() if order == "desc" else objects.c.sequence.asc()
            query = query.order_by(direction)
            if metadata or no_metadata:
                places = _labelled(connection, query, {} if no_metadata else metadata or {}, limit + 1)
                query = query.where(objects.c.sequence.in_(places))
            found = connection.execute(query.limit(limit + 1)).scalars().all()
        things = tuple(self._record.model_validate(record) for record in found[:limit])
        return Page(items=things, has_more=len(found) > limit)

    def all(self, project: str, *, order: Order = "asc", parent: str | None = None) -> Iterator[T]:
        """Yield all of a project's things, some at a time."""
        after: str | None = None
        more = True
        while more:
            page = self.page(project, after=after, limit=BLOCK, order=order, parent=parent)
            yield from page.items
            more, after = page.has_more, page.items[-1].id if page.items else None

    def everywhere(self, status: str) -> list[T]:
        """Return the things of all projects that have a status: for the service itself, never for a request."""
        query = sa.select(objects.c.record).where(objects.c.kind == self._kind, objects.c.status == status)
        with self._database.read() as connection:
            found = connection.execute(query.order_by(objects.c.sequence)).scalars().all()
        return [self._record.model_validate(record) for record in found]

    def expired(self, moment: int) -> list[T]:
        """Return the things of all projects whose ``expires_at`` has come: for the service itself."""
        ends = objects.c.record["expires_at"].as_integer()
        query = sa.select(objects.c.record).where(objects.c.kind == self._kind, ends <= moment)
        with self._database.read() as connection:
            return [self._record.model_validate(record) for record in connection.execute(query).scalars().all()]

    def _is(self, project: str, id: str) -> sa.ColumnElement[bool]:
        return sa.and_(objects.c.kind == self._kind, objects.c.project == project, objects.c.id == id)

    def _missing(self, id: str) -> NotFoundError:
        return NotFoundError(f"There is no {self._kind} {id!r}.")


def _labelled(connection: sa.Connection, query: sa.Select[Any], metadata: Mapping[str, str], most: int) -> list[int]:
    """Return the places of the first things with some labels, or without any where none are given.

    Labels are compared here, because users choose their keys: one with a quotation mark in it cannot be written in a
    path of SQLite's JSON. No more than the labels of a thing are read.
    """
    labels_of = query.with_only_columns(objects.c.sequence, objects.c.record["metadata"])
    places: list[int] = []
    for place, labels in connection.execute(labels_of.execution_options(yield_per=BLOCK)):
        has = labels or {}
        if all(has.get(key) == value for key, value in metadata.items()) if metadata else not has:
            places.append(place)
        if len(places) == most:
            break
    return places


def _row(thing: Stored) -> dict[str, object]:
    searched = {name: getattr(thing, name, None) for name in SEARCHED}
    return {
        "id": thing.id,
        "project": thing.project,
        "created_at": thing.created_at,
        "record": thing.model_dump(mode="json"),
        **searched,
    }
