"""Datasets: import a file, divide it, look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import ConflictError, InputError
from luthier.ingest.formats import detect_format
from luthier.ingest.given_splits import given_splits
from luthier.ingest.importing import import_examples, take_rows
from luthier.ingest.logged import logged_example
from luthier.ingest.splitting import assign_splits
from luthier.records.access import DEFAULT_PROJECT
from luthier.records.dataset import DatasetVersion, ImportReport, SourceFormat, SourceKind, SplitConfig, SplitReport
from luthier.records.example import Example, SplitName
from luthier.records.run import Run
from luthier.store.store import Store
from luthier.workflows.completions import completions_of

OnProgress = Callable[[int, int], None]


def import_dataset(
    store: Store,
    path: Path,
    name: str,
    *,
    kind: SourceKind | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    on_progress: OnProgress | None = None,
) -> DatasetVersion:
    """Import a CSV, JSONL or text file, or a folder of text files, as a new version of a dataset.

    Nothing is left behind where that fails.

    Args:
        store: Where it is kept.
        path: The file or folder.
        name: The dataset's name.
        kind: How to read it; detected where not given, like ``encoding`` and ``delimiter``.
        encoding: The text encoding.
        delimiter: What separates the columns of a CSV file.
        on_progress: Hears of bytes done and in all.

    Raises:
        InputError: the file cannot be read, or no row of it can be taken.
    """
    found = detect_format(path, kind=kind, encoding=encoding, delimiter=delimiter)
    return store.datasets.add(
        name,
        "chat" if found.kind == "chat" else "fields",
        str(path),
        lambda write: import_examples(path, found, write, on_progress=on_progress),
    )


def import_completions(
    store: Store,
    name: str,
    *,
    project: str = DEFAULT_PROJECT,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> DatasetVersion:
    """Make a new version of a dataset from a project's stored completions; answers that were cut off are left out.

    Args:
        store: Where they are.
        name: The dataset's name.
        project: Whose.
        model: Only answers of this model, by the name that was asked.
        metadata: Only those with all of these labels.

    Raises:
        InputError: none of them can be taken.
    """

    def fill(write: Callable[[Example], None]) -> ImportReport:
        found = completions_of(store, project, model=model, metadata=metadata)
        rows = (logged_example(stored, number) for number, stored in enumerate(found, 1))
        report = take_rows(rows, SourceFormat(kind="chat"), write)
        if not report.taken:
            fitting = f"each of the {report.left:,} that fit is bad" if report.left else "none fits"
            raise InputError(
                f"No stored completion of the project {project!r} can be taken: {fitting}.",
                problems=[row.reason for row in report.bad_rows],
                hint="requests are stored where they have store=True",
            )
        return report

    return store.datasets.add(name, "chat", f"stored completions of the project {project}", fill)


def split_dataset(store: Store, reference: str, config: SplitConfig) -> DatasetVersion:
    """Divide a dataset into train, validation and test; the result is a new version.

    Raises:
        NotFoundError: there is no such dataset.
        InputError: the label field is unknown, or there are too few examples.
    """
    dataset = store.datasets.get(reference)
    examples = store.datasets.examples(dataset)
    sides, report = given_splits(list(examples), config) if config.column else assign_splits(examples, config)

    def fill(write: Callable[[Example], None]) -> SplitReport:
        for example in store.datasets.with_splits(dataset, sides):
            write(example)
        return report

    return store.datasets.add(dataset.name, dataset.kind, dataset.source, fill, parent=dataset)


def dataset_bytes(store: Store, name: str) -> int:
    """Return what all versions of a dataset take on disk, in bytes: what deleting it frees.

    Raises:
        NotFoundError, InputError, ConflictError: it cannot be deleted, see :func:`delete_dataset`.
    """
    return sum(store.datasets.bytes(version) for version in _deletable(store, name))


def delete_dataset(store: Store, name: str) -> None:
    """Delete every version of a dataset.

    What a model was trained on stays as long as the model: its record names the version. Evaluations keep their own
    questions and answers, and the hash of what they were made from.

    Raises:
        NotFoundError: there is no such dataset.
        InputError: it is one version, not a name.
        ConflictError: a tuned model was trained on it, or a run that may go on names it.
    """
    _deletable(store, name)
    store.datasets.remove(name)


def _deletable(store: Store, name: str) -> list[DatasetVersion]:
    versions = store.datasets.versions(name)
    if not versions:
        store.datasets.get(name)  # says which one may be meant
        raise InputError(f"A dataset is deleted with all its versions, and {name!r} names one.")
    # Runs first: one that ends in between has left a model.
    runs = [run.id for run in store.runs.all(limit=None) if run.may_go_on and name in _named_by(run)]
    models = [model.name for model in store.models.all() if _name(model.dataset) == name]
    if models or runs:
        raise ConflictError(
            f"The dataset {name!r} is needed: models were trained on it, or runs that may go on name it.",
            problems=[*models, *runs],
            hint="luthier model delete MODEL, luthier run cancel RUN",
        )
    return versions


def _name(reference: str) -> str:
    return reference.partition("@")[0]


def _named_by(run: Run) -> set[str]:
    """Return the dataset that a run names, and the uploaded files of which it makes one under the first one's name."""
    files = run.config.get("files") or {}
    return {_name(run.config.get("dataset") or ""), files.get("training") or ""}


def side(store: Store, dataset: DatasetVersion, split: SplitName) -> list[Example]:
    """Return the examples of one side, all of them in memory.

    Raises:
        InputError: the dataset is not divided yet, or the side is empty.
    """
    return list(Side(store, dataset, split))


@dataclass(frozen=True)
class Side:
    """The examples of one side, read from their file each time that they are asked for, and never held."""

    store: Store
    dataset: DatasetVersion
    split: SplitName

    def __iter__(self) -> Iterator[Example]:
        """Yield them.

        Raises:
            InputError: the dataset is not divided yet, or the side is empty (validation may be).
        """
        dataset, empty = self.dataset, self.split != "validation"
        if dataset.split is None:
            raise InputError(
                f"The dataset {dataset.reference} is not divided into train, validation and test.",
                hint=f"luthier dataset split {dataset.name}",
            )
        for example in self.store.datasets.examples(dataset, self.split):
            empty = False
            yield example
        if empty:
            raise InputError(
                f"The {self.split} side of {dataset.reference} is empty.", hint="divide it again with a larger share"
            )
