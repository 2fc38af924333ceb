"""Dataset versions: a row in the database, and a folder with one JSON line per example."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime

import sqlalchemy as sa
from pydantic import ValidationError

from luthier.errors import IntegrityError
from luthier.records.dataset import DatasetKind, DatasetVersion, ImportReport, SplitReport
from luthier.records.example import Example, SplitName
from luthier.store.artifacts import Artifacts
from luthier.store.database import Database
from luthier.store.tables import datasets
from luthier.store.versions import check_name, find_version, newest_version

EXAMPLES_FILE = "examples.jsonl"
Write = Callable[[Example], None]


class DatasetStore:
    """Datasets in the database and the artifact folder."""

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._artifacts = artifacts

    def add(
        self,
        name: str,
        kind: DatasetKind,
        source: str,
        fill: Callable[[Write], ImportReport | SplitReport],
        *,
        parent: DatasetVersion | None = None,
    ) -> DatasetVersion:
        """Add a version of a dataset: ``fill`` writes its examples one by one and returns a report.

        Memory use does not depend on the number of examples. Where ``fill`` raises, nothing is left behind.
        """
        check_name(name, "dataset")
        key = f"datasets/{name}/{uuid.uuid4().hex[:12]}"
        digest = hashlib.sha256()
        count = 0
        with self._artifacts.new(key) as folder, (folder / EXAMPLES_FILE).open("wb") as file:

            def write(example: Example) -> None:
                nonlocal count
                line = example.model_dump_json().encode() + b"\n"
                file.write(line)
                digest.update(line)
                count += 1

            report = fill(write)
        fresh = DatasetVersion(
            name=name,
            version=1,
            kind=kind,
            fields=report.fields if isinstance(report, ImportReport) else parent.fields if parent else (),
            examples=count,
            content_hash=digest.hexdigest(),
            folder=key,
            source=source,
            created_at=datetime.now(UTC),
            parent=parent.version if parent else None,
            report=report if isinstance(report, ImportReport) else parent.report if parent else None,
            split=report if isinstance(report, SplitReport) else None,
        )
        with self._database.write() as connection:
            record = fresh.model_copy(update={"version": newest_version(connection, datasets, name) + 1})
            row = {"name": name, "version": record.version, "content_hash": record.content_hash}
            connection.execute(sa.insert(datasets).values(**row, record=record.model_dump(mode="json")))
        return record

    def get(self, reference: str) -> DatasetVersion:
        """Return ``name`` (its newest version) or ``name@version``.

        Raises:
            NotFoundError: there is none.
        """
        with self._database.read() as connection:
            return DatasetVersion.model_validate(find_version(connection, datasets, reference, "dataset"))

    def versions(self, name: str) -> list[DatasetVersion]:
        """Return every version of a name, the oldest first; none where there is no such dataset."""
        query = sa.select(datasets.c.record).where(datasets.c.name == name).order_by(datasets.c.version)
        with self._database.read() as connection:
            return [DatasetVersion.model_validate(record) for record in connection.execute(query).scalars()]

    def all(self) -> list[DatasetVersion]:
        """Return every version of every dataset."""
        query = sa.select(datasets.c.record).order_by(datasets.c.name, datasets.c.version)
        with self._database.read() as connection:
            return [DatasetVersion.model_validate(record) for record in connection.execute(query).scalars()]

    def remove(self, name: str) -> None:
        """Delete every version of a name, their records first, so that whatever is listed is there."""
        versions = self.versions(name)
        with self._database.write() as connection:
            connection.execute(sa.delete(datasets).where(datasets.c.name == name))
        for version in versions:
            self._artifacts.remove(version.folder)

    def bytes(self, dataset: DatasetVersion) -> int:
        """Return the size of a version's examples on disk."""
        return (self._artifacts.path(dataset.folder) / EXAMPLES_FILE).stat().st_size

    def examples(self, dataset: DatasetVersion, split: SplitName | None = None) -> Iterator[Example]:
        """Yield the examples of a version, or of one side of its split, in their order.

        Raises:
            IntegrityError: the file is not the recorded one (known for sure once all of it was read).
        """
        digest = hashlib.sha256()
        damaged = IntegrityError(f"The examples of {dataset.reference} on disk are not the recorded ones.")
        try:
            with (self._artifacts.path(dataset.folder) / EXAMPLES_FILE).open("rb") as file:
                for line in file:
                    digest.update(line)
                    example = Example.model_validate_json(line)
                    if split is None or example.split == split:
                        yield example
        except (FileNotFoundError, ValidationError) as error:
            raise damaged from error
        if digest.hexdigest() != dataset.content_hash:
            raise damaged

    def with_splits(self, dataset: DatasetVersion, sides: Iterable[SplitName]) -> Iterator[Example]:
        """Yield the examples of a version with new sides, given in the examples' order."""
        for example, side in zip(self.examples(dataset), sides, strict=True):
            yield example.model_copy(update={"split": side})
