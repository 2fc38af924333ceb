"""Dataset versions, and what an import or a split did."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from luthier.records.example import SplitName
from luthier.records.record import Record

DatasetKind = Literal["fields", "chat"]
SourceKind = Literal["csv", "jsonl", "chat", "text"]


class BadRow(Record):
    """A row that was left out: its line in the source (from 1; in a folder, which file) and the rule it breaks."""

    line: int
    reason: str


class SourceFormat(Record):
    """How a source was read; every part is detected unless the user names it."""

    kind: SourceKind
    encoding: str = "utf-8"
    delimiter: str | None = None


class ImportReport(Record):
    """What an import took and left. ``bad_rows`` holds the first 1,000; ``left`` counts all."""

    format: SourceFormat
    taken: int
    left: int
    fields: tuple[str, ...]
    bad_rows: tuple[BadRow, ...] = ()


class SplitConfig(Record):
    """How to divide examples into train, validation and test.

    Shares are of all examples; what remains is train. With ``label`` the shares hold for every value of that
    field. Exact and near duplicates (estimated Jaccard similarity of word shingles at or above
    ``near_duplicate_similarity``; None looks only for exact ones) stay on one side. A ``column`` names a field that
    says the side of each example; it is followed as it is.
    """

    validation: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**31)
    label: str | None = None
    near_duplicate_similarity: float | None = Field(0.8, gt=0, le=1)
    column: str | None = None


class SplitReport(Record):
    """What a split made: counts per side, per side and label, and the duplicates kept together.

    ``largest_group`` is the number of examples in the largest group of duplicates; a group larger than what a
    held-out side may take is in train.
    """

    config: SplitConfig
    counts: dict[SplitName, int]
    label_counts: dict[SplitName, dict[str, int]] = Field(default_factory=dict)
    exact_duplicates: int = 0
    near_duplicates: int = 0
    largest_group: int = 0


class DatasetVersion(Record):
    """An immutable version of a dataset.

    ``content_hash`` covers every example with its side of the split; ``folder`` is the key of its artifact.
    """

    name: str
    version: int
    kind: DatasetKind
    fields: tuple[str, ...]
    examples: int
    content_hash: str
    folder: str
    source: str
    created_at: datetime
    parent: int | None = None
    report: ImportReport | None = None
    split: SplitReport | None = None

    @property
    def reference(self) -> str:
        """The text that names this version, such as ``tweets@2``."""
        return f"{self.name}@{self.version}"
