"""Evals, their runs, and the items of runs: an item and what it changes in the run's tally are kept together."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from luthier.errors import NotFoundError
from luthier.records.eval import Eval, EvalRun, OutputItem
from luthier.store.collection import Collection
from luthier.store.database import Database
from luthier.store.tables import objects

RUN, ITEM = "eval run", "output item"


class EvalStore:
    """The three collections, and what concerns more than one of them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.evals = Collection(database, "eval", Eval)
        self.runs = Collection(database, RUN, EvalRun)
        self.items = Collection(database, ITEM, OutputItem)

    def keep(self, run: EvalRun, items: Sequence[OutputItem]) -> None:
        """Keep items of a run, and count them; once this returns, they are there after any kill.

        Raises:
            NotFoundError: the run was deleted.
        """
        with self._database.write() as connection:
            record = connection.execute(sa.select(objects.c.record).where(_is(RUN, run.project, run.id))).scalar()
            if record is None:
                raise _missing(run.id)
            current = EvalRun.model_validate(record)
            tally = current.tally
            for item in items:
                self.items.add_in(connection, item)
                tally = tally.with_item(item)
            changed = current.model_copy(update={"tally": tally}).model_dump(mode="json")
            connection.execute(sa.update(objects).where(_is(RUN, run.project, run.id)).values(record=changed))

    def numbers(self, run: EvalRun) -> set[int]:
        """Return the numbers of a run's items that are kept."""
        query = sa.select(objects.c.record["number"].as_integer()).where(_of(ITEM, run.project, run.id))
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def remove_run(self, project: str, id: str) -> None:
        """Delete a run and its items.

        Raises:
            NotFoundError: the project has none of that id.
        """
        with self._database.write() as connection:
            if connection.execute(sa.delete(objects).where(_is(RUN, project, id))).rowcount == 0:
                raise _missing(id)
            connection.execute(sa.delete(objects).where(_of(ITEM, project, id)))


def _missing(id: str) -> NotFoundError:
    return NotFoundError(f"There is no {RUN} {id!r}.")


def _is(kind: str, project: str, id: str) -> sa.ColumnElement[bool]:
    return sa.and_(objects.c.kind == kind, objects.c.project == project, objects.c.id == id)


def _of(kind: str, project: str, parent: str) -> sa.ColumnElement[bool]:
    return sa.and_(objects.c.kind == kind, objects.c.project == project, objects.c.parent == parent)
