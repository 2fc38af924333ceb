"""Divide examples into train, validation and test so that nothing held out was, in other words, trained on.

In: examples and a :class:`~luthier.records.dataset.SplitConfig`. Out: a side for each example, in order, and a report.

1. *Contents.* What is compared is the text of an example without its label, in lower case and with white space folded.
   The first rows decide which fields are text (an id or a rating does not make a copy a new example).
2. *Groups.* Equal contents are one group, and so are contents that :mod:`luthier.ingest.near_duplicates` finds alike.
3. *Sides.* Groups are ranked by a seeded hash of their contents and fill the shares of each label.

One pass over the examples; 16 bytes and one signature (256 bytes) are kept for each different content, not its text.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from luthier.errors import InputError, did_you_mean
from luthier.ingest.near_duplicates import (
    PERMUTATIONS,
    SIGNATURE_BYTES,
    Shingling,
    Signatures,
    choose_shingling,
    group_near_duplicates,
    signature,
)
from luthier.records.dataset import SplitConfig, SplitReport
from luthier.records.example import Example, Message, SplitName
from luthier.records.record import canonical_json

SIDES: tuple[SplitName, ...] = ("train", "validation", "test")
PROGRESS_ROWS = 1_000
SAMPLE_ROWS = 1_000
SAMPLE_CHARS = 2_000_000
MAX_FIELD_NAMES = 1_000
MESSAGES = "\0messages"
ANSWERS = "\0answers"

_LETTERS = re.compile(r"[^\W\d_]+")


def assign_splits(
    examples: Iterable[Example], config: SplitConfig, on_progress: Callable[[int], None] | None = None
) -> tuple[list[SplitName], SplitReport]:
    """Return the side of each example, in the order given, and a report.

    The same examples and seed give the same sides, on every machine. The shares hold for each label as nearly
    as whole groups permit; a label with three groups or more has an example on every side that has a share; a group
    too large for a held-out share goes to train. An example's group counts for the label most of its members have.

    Args:
        examples: Read once.
        config: The shares, the seed, the label field and the similarity from which two contents are near duplicates.
        on_progress: Called with the examples read so far, every 1,000 examples.

    Raises:
        InputError: The shares leave nothing to train on, the label field is unknown or missing in some examples, or
            there are too few different examples to fill every side.
    """
    shares: dict[SplitName, float] = {"test": config.test, "validation": config.validation}
    shares = {side: share for side, share in shares.items() if share > 0}
    if sum(shares.values()) >= 1:
        raise InputError(
            f"validation ({config.validation}) and test ({config.test}) leave nothing for train; "
            "together they must be less than 1."
        )
    contents = _read_contents(examples, config, on_progress)
    roots = _roots(contents, config.near_duplicate_similarity)
    groups = _groups(contents, roots, config.seed)
    _check_enough(contents, groups, shares)
    side_of = _place_groups(groups, shares)
    sides = [side_of[roots[content]] for content in contents.of_row]
    _check_filled(contents, groups, sides, shares, config)
    return sides, _report(contents, groups, sides, config)


# Contents


@dataclass
class _Contents:
    """What is remembered of the examples: the content and the label of each row, and each content's key."""

    of_row: array[int] = field(default_factory=lambda: array("q"))
    label_of_row: array[int] = field(default_factory=lambda: array("q"))
    labels: dict[str, int] = field(default_factory=dict)
    keys: dict[bytes, int] = field(default_factory=dict)
    signature_bytes: bytearray = field(default_factory=bytearray)

    def take_signatures(self) -> Signatures:
        """Return the signatures and let go of them: they are the largest part."""
        taken, self.signature_bytes = self.signature_bytes, bytearray()
        return np.frombuffer(taken, np.uint16).reshape(-1, PERMUTATIONS)


@dataclass(frozen=True)
class _View:
    """What counts as content: the fields compared (None: all), and how their text is cut into shingles."""

    fields: frozenset[str] | None
    shingling: Shingling


def _read_contents(
    examples: Iterable[Example], config: SplitConfig, on_progress: Callable[[int], None] | None
) -> _Contents:
    contents = _Contents()
    labels = _LabelReader(config.label)
    rows = iter(examples)
    sample = _take_sample(rows)
    view = _choose_view([_texts(example, config.label) for example in sample])
    for number, example in enumerate(chain(sample, rows), 1):
        texts = _compared(_texts(example, config.label), view.fields)
        content = contents.keys.setdefault(_key(texts), len(contents.keys))
        if config.near_duplicate_similarity is not None and content * SIGNATURE_BYTES == len(contents.signature_bytes):
            contents.signature_bytes += signature(" ".join(texts.values()), view.shingling).tobytes()
        label = labels.read(example, number)
        contents.of_row.append(content)
        contents.label_of_row.append(contents.labels.setdefault(label, len(contents.labels)))
        if on_progress and number % PROGRESS_ROWS == 0:
            on_progress(number)
    labels.check(len(contents.of_row))
    return contents


def _take_sample(rows: Iterator[Example]) -> list[Example]:
    sample: list[Example] = []
    characters = 0
    for example in rows:
        sample.append(example)
        characters += sum(map(len, _texts(example, None).values()))
        if len(sample) == SAMPLE_ROWS or characters > SAMPLE_CHARS:
            break
    return sample


def _texts(example: Example, label: str | None) -> dict[str, str]:
    """Return the contents by name, without the label, in lower case and with white space folded.

    A pair's prompt stands apart from its answers, so that all pairs of one prompt stay on one side.
    """
    texts = {name: _fold(value) for name, value in example.fields.items() if name != label}
    if example.messages and example.rejected:
        texts[MESSAGES] = _fold_turns(example.messages[:-1])
        texts[ANSWERS] = _fold_turns((*example.messages[-1:], *example.rejected))
    elif example.messages:
        texts[MESSAGES] = _fold_turns(example.messages)
    return texts


def _fold_turns(messages: Iterable[Message]) -> str:
    return _fold("\n".join(f"{message.role} {message.whole_text}" for message in messages))


def _fold(value: Any) -> str:
    if value is None:
        return ""
    return " ".join((value if isinstance(value, str) else canonical_json(value)).casefold().split())


def _key(texts: Mapping[str, str]) -> bytes:
    return blake2b(canonical_json(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _compared(texts: Mapping[str, str], fields: frozenset[str] | None) -> dict[str, str]:
    if fields is None:
        return dict(texts)
    chosen = {name: text for name, text in texts.items() if name in fields}
    return chosen if any(chosen.values()) else dict(texts)


def _choose_view(sample: Sequence[Mapping[str, str]]) -> _View:
    fields = _text_fields(sample)
    everything = {_key(texts) for texts in sample}
    different = {_key(_compared(texts, fields)) for texts in sample}
    # Where the text hardly differs (one question, two numbers), the other fields are what makes an example.
    if len(different) * 5 < len(everything):
        fields = None
    return _View(fields, choose_shingling({" ".join(_compared(texts, fields).values()) for texts in sample}))


def _text_fields(sample: Sequence[Mapping[str, str]]) -> frozenset[str] | None:
    present: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for row in sample:
        present.update(row.keys())
        texts.update(name for name, text in row.items() if name != ANSWERS and _is_text(text))
    return frozenset(name for name, count in texts.items() if count * 2 >= present[name]) or None


def _is_text(text: str) -> bool:
    return len(_LETTERS.findall(text)) >= 2 and (" " in text or (len(text) >= 10 and not text.isascii()))


# Groups and sides


def _roots(contents: _Contents, similarity: float | None) -> list[int]:
    """Return for each content the first content of its group."""
    if similarity is None:
        return list(range(len(contents.keys)))
    return group_near_duplicates(contents.take_signatures(), similarity)


class _Group(NamedTuple):
    """Contents that stay together: ``rank`` orders groups at random, ``root`` is their first content."""

    rank: bytes
    root: int
    size: int
    label: str


def _groups(contents: _Contents, roots: Sequence[int], seed: int) -> list[_Group]:
    sizes: Counter[int] = Counter()
    label_counts: Counter[tuple[int, int]] = Counter()
    for content, label in zip(contents.of_row, contents.label_of_row, strict=True):
        sizes[roots[content]] += 1
        label_counts[roots[content], label] += 1
    names = list(contents.labels)
    majority: dict[int, tuple[int, str]] = {}
    for (root, label), count in label_counts.items():
        candidate = (-count, names[label])
        majority[root] = min(majority.get(root, candidate), candidate)
    keys: dict[int, bytes] = {}
    for key, content in contents.keys.items():
        keys[roots[content]] = min(keys.get(roots[content], key), key)
    salt = seed.to_bytes(8, "little")
    return [
        _Group(blake2b(keys[root], digest_size=8, salt=salt).digest(), root, size, majority[root][1])
        for root, size in sizes.items()
    ]


def _place_groups(groups: Iterable[_Group], shares: Mapping[SplitName, float]) -> dict[int, SplitName]:
    """Return a side for each group by its root; what rounding left over or took too much goes on to the next label."""
    by_label: dict[str, list[_Group]] = {}
    for group in groups:
        by_label.setdefault(group.label, []).append(group)
    carried = dict.fromkeys(shares, 0.0)
    side_of: dict[int, SplitName] = {}
    for label in sorted(by_label):
        examples = sum(group.size for group in by_label[label])
        quotas = {side: share * examples + carried[side] for side, share in shares.items()}
        placed = _fill_quotas(sorted(by_label[label]), quotas)
        for side, quota in quotas.items():
            carried[side] = min(1.0, max(-1.0, quota - sum(group.size for group in placed[side])))
        side_of |= {group.root: side for side, members in placed.items() for group in members}
    return side_of


def _fill_quotas(groups: Sequence[_Group], quotas: Mapping[SplitName, float]) -> dict[SplitName, list[_Group]]:
    placed: dict[SplitName, list[_Group]] = {side: [] for side in SIDES}
    wanted = {side: max(0, int(quota + 0.5)) for side, quota in quotas.items()}
    left = dict(wanted)
    for number, group in enumerate(groups, 1):
        fitting = [side for side in left if group.size <= left[side]]
        if not fitting or (number == len(groups) and not placed["train"]):
            placed["train"].append(group)
            continue
        side = max(fitting, key=lambda name: left[name] / wanted[name])
        placed[side].append(group)
        left[side] -= group.size
    if len(groups) > len(quotas):
        _fill_empty_sides(placed, quotas)
    return placed


def _fill_empty_sides(placed: dict[SplitName, list[_Group]], quotas: Iterable[SplitName]) -> None:
    """Give each empty side the smallest group of train, or of the side with the most groups if train has only one."""
    for side in quotas:
        if placed[side]:
            continue
        giver = "train" if len(placed["train"]) > 1 else max(SIDES, key=lambda name: len(placed[name]))
        smallest = min(placed[giver], key=lambda group: (group.size, group.rank))
        placed[giver].remove(smallest)
        placed[side].append(smallest)


# Checks and report


class _LabelReader:
    """Reads labels as text, and remembers rows without one so that all are reported at once."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._field_names: dict[str, None] = {}
        self._missing: list[str] = []
        self._missing_count = 0
        self._found = False

    def read(self, example: Example, number: int) -> str:
        if self._name is None:
            return ""
        value = example.fields.get(self._name)
        self._found |= self._name in example.fields
        if len(self._field_names) < MAX_FIELD_NAMES:
            self._field_names.update(dict.fromkeys(example.fields))
        text = value if isinstance(value, str) else "" if value is None else canonical_json(value)
        if not text.strip():
            self._missing_count += 1
            if len(self._missing) < MAX_FIELD_NAMES:
                self._missing.append(f"line {example.line}" if example.line else f"example {number} ({example.id})")
        return text

    def check(self, examples: int) -> None:
        if self._name is None or not examples:
            return
        if not self._found:
            suggestion = did_you_mean(self._name, self._field_names) or " The examples have no fields."
            raise InputError(f"There is no field {self._name!r} to take the labels from.{suggestion}")
        if self._missing_count:
            raise InputError(
                f"{self._missing_count:,} of {examples:,} examples have no value for the label {self._name!r}; "
                f"the first is {self._missing[0]}.",
                problems=[f"{place}: no {self._name!r}" for place in self._missing],
                hint="fill the label in, or leave these rows out of the dataset",
            )


def _check_enough(contents: _Contents, groups: Sequence[_Group], shares: Mapping[SplitName, float]) -> None:
    sides = len(shares) + 1
    if len(groups) >= sides:
        return
    names = " and ".join(["train", *sorted(shares, reverse=True)])
    raise InputError(
        f"{len(contents.of_row):,} examples in {len(groups):,} groups of duplicates cannot fill {sides} sides "
        f"({names}); at least {sides} groups are needed.",
        hint="add examples that differ, or raise --near (near_duplicate_similarity)"
        if len(contents.of_row) >= sides
        else None,
    )


def _check_filled(
    contents: _Contents,
    groups: Sequence[_Group],
    sides: Sequence[SplitName],
    shares: Mapping[SplitName, float],
    config: SplitConfig,
) -> None:
    filled = set(sides)
    empty = [side for side in shares if side not in filled]
    if not empty:
        return
    by_label = f" over {len(contents.labels):,} labels of {config.label!r}" if config.label else ""
    raise InputError(
        f"Nothing is left for {' and '.join(empty)}: {len(sides):,} examples in {len(groups):,} groups of duplicates"
        f"{by_label}, the largest with {max(group.size for group in groups):,} examples; "
        f"a label needs {len(shares) + 1} groups.",
        hint="add examples, take larger shares, or choose a label with fewer values",
    )


def _report(
    contents: _Contents, groups: Sequence[_Group], sides: Sequence[SplitName], config: SplitConfig
) -> SplitReport:
    counts = Counter(sides)
    pairs = Counter(zip(sides, contents.label_of_row, strict=True))
    labels = sorted(contents.labels.items()) if config.label else []
    label_counts = {side: {label: pairs[side, number] for label, number in labels} for side in SIDES}
    return SplitReport(
        config=config,
        counts={side: counts[side] for side in SIDES},
        label_counts=label_counts if config.label else {},
        exact_duplicates=len(sides) - len(contents.keys),
        near_duplicates=len(contents.keys) - len(groups),
        largest_group=max(group.size for group in groups),
    )
