"""Evaluations, and every answer of every contestant."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from luthier.errors import NotFoundError
from luthier.records.evaluation import Answer, Evaluation
from luthier.store.database import Database
from luthier.store.tables import answers, evaluations


class EvaluationStore:
    """Evaluations in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, evaluation: Evaluation, given: Sequence[Answer]) -> None:
        """Save an evaluation with its answers, all or nothing; saving it again replaces it."""
        record = evaluation.model_dump(mode="json")
        row = {"id": evaluation.id, "model": evaluation.model, "created_at": evaluation.created_at.timestamp()}
        lines = [
            {
                "evaluation_id": evaluation.id,
                "example_id": answer.example_id,
                "contestant": answer.contestant,
                "record": answer.model_dump(mode="json"),
            }
            for answer in given
        ]
        with self._database.write() as connection:
            connection.execute(sa.delete(answers).where(answers.c.evaluation_id == evaluation.id))
            connection.execute(sa.delete(evaluations).where(evaluations.c.id == evaluation.id))
            connection.execute(sa.insert(evaluations).values(**row, record=record))
            if lines:
                connection.execute(sa.insert(answers), lines)

    def get(self, evaluation_id: str) -> Evaluation:
        """Return an evaluation.

        Raises:
            NotFoundError: there is none of that id.
        """
        query = sa.select(evaluations.c.record).where(evaluations.c.id == evaluation_id)
        with self._database.read() as connection:
            record = connection.execute(query).scalar()
        if record is None:
            raise NotFoundError(f"There is no evaluation {evaluation_id!r}.", hint="luthier evaluation list")
        return Evaluation.model_validate(record)

    def all(self, model: str | None = None) -> list[Evaluation]:
        """Return evaluations, the newest first; of one model where it is named."""
        query = sa.select(evaluations.c.record).order_by(evaluations.c.created_at.desc())
        if model:
            query = query.where(evaluations.c.model == model)
        with self._database.read() as connection:
            return [Evaluation.model_validate(record) for record in connection.execute(query).scalars()]

    def answers(self, evaluation_id: str) -> list[Answer]:
        """Return all answers of an evaluation, by example and contestant."""
        query = sa.select(answers.c.record).where(answers.c.evaluation_id == evaluation_id)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(answers.c.example_id, answers.c.contestant)).scalars().all()
        return [Answer.model_validate(row) for row in rows]
