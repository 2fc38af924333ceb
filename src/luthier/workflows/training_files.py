"""The dataset of a run that learns from uploaded files: made once by its worker, found again after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from luthier.errors import InputError
from luthier.ingest.training_rows import read_training_rows
from luthier.records.dataset import BadRow, DatasetVersion, SplitConfig, SplitReport
from luthier.records.example import Example, SplitName
from luthier.records.fine_tuning import TrainingFiles
from luthier.store.store import Store
from luthier.workflows.files import file_path

MAX_BAD_ROWS_KEPT = 1_000
GIVEN_SIDES = SplitConfig(validation=0.0, test=0.0, near_duplicate_similarity=None)


def dataset_of_files(store: Store, project: str, files: TrainingFiles, *, pairs: bool) -> DatasetVersion:
    """Return the dataset of a project's training file and, where there is one, its validation file.

    It is named after the training file; all examples of that are its training side.

    Raises:
        NotFoundError: the project has no such file.
        InputError: rows break a rule; all are named with their lines.
    """
    source = " + ".join(["pairs" if pairs else "answers", files.training, *filter(None, [files.validation])])
    made = next((found for found in store.datasets.versions(files.training) if found.source == source), None)
    if made is not None:
        return made

    def fill(write: Callable[[Example], None]) -> SplitReport:
        counts: dict[SplitName, int] = {}
        counts["train"] = _write_side(_examples(store, project, files.training, pairs), "train", write)
        if files.validation is not None:
            held_out = _examples(store, project, files.validation, pairs)
            counts["validation"] = _write_side(held_out, "validation", write)
        return SplitReport(config=GIVEN_SIDES, counts=counts)

    return store.datasets.add(files.training, "chat", source, fill)


def _write_side(examples: Iterator[Example], side: SplitName, write: Callable[[Example], None]) -> int:
    count = 0
    for example in examples:
        count += 1
        # Both files count their lines from 1, and examples of a dataset need ids of their own.
        id = example.id if side == "train" else f"{side}-{example.id}"
        write(example.model_copy(update={"split": side, "id": id}))
    return count


def _examples(store: Store, project: str, id: str, pairs: bool) -> Iterator[Example]:
    """Yield the examples of a file; where rows are bad, raise at the end with all of them."""
    file = store.files.get(project, id)
    bad: list[BadRow] = []
    rows = wrong = 0
    for row in read_training_rows(file_path(store, project, id), pairs=pairs):
        rows += 1
        if isinstance(row, Example):
            yield row
            continue
        wrong += 1
        if len(bad) < MAX_BAD_ROWS_KEPT:
            bad.append(row)
    if not rows:
        raise InputError(f"The file {id} ({file.filename}) has no examples.")
    if wrong:
        raise InputError(
            f"{wrong:,} of the {rows:,} lines of the file {id} ({file.filename}) cannot be learned from.",
            problems=[f"line {row.line}: {row.reason}" for row in bad],
        )
