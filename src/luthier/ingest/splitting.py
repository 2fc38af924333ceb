"""Divide examples into train, validation and test so that nothing held out was, in other words, trained on.

In: examples and a :class:`~luthier.records.dataset.SplitConfig`. Out: a side for each example, in order, and a report.

1. *Contents.* What is compared is the text of an example without its label, in lower case and with white space folded.
   The first rows decide which fields are text (an id or a rating does not make a copy a new example) and which runs of
   words are an instruction that many examples share, and which says nothing about their likeness.
2. *Groups.* Equal contents are one group, and so are contents with alike sets of word shingles: MinHash signatures
   (Broder, "On the resemblance and containment of documents", 1997) are banded for candidates (Leskovec, Rajaraman,
   Ullman, "Mining of Massive Datasets", section 3.4), which their estimated Jaccard similarity confirms.
3. *Sides.* Groups are ranked by a seeded hash of their contents and fill the shares of each label.

One pass over the examples; 16 bytes and one signature (256 bytes) are kept for each different content, not its text.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from luthier.errors import InputError, did_you_mean
from luthier.records.dataset import SplitConfig, SplitReport
from luthier.records.example import Example, SplitName
from luthier.records.record import canonical_json

SIDES: tuple[SplitName, ...] = ("train", "validation", "test")
PERMUTATIONS = 128
SIGNATURE_BYTES = 2 * PERMUTATIONS
BAND_RECALL = 0.99
WINDOW = 8
PAIRS_AT_ONCE = 1 << 16
SHINGLES_AT_ONCE = 1 << 12
PROGRESS_ROWS = 1_000
SAMPLE_ROWS = 1_000
SAMPLE_CHARS = 2_000_000
COMMON_SHARE = 0.2
COMMON_EXAMPLES = 20
MAX_FIELD_NAMES = 1_000
MESSAGES = "\0messages"

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint16]

# Letters of scripts without spaces are words of their own; signs of arithmetic and code tell "3 + 4" from "3 * 4".
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[+*/=<>^%|]")
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
    roots = _join_near_duplicates(contents.take_signatures(), config.near_duplicate_similarity, len(contents.keys))
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
    """What counts as content: the fields compared (None: all), words per shingle, and runs of words to ignore."""

    fields: frozenset[str] | None
    shingle_words: int
    common_runs: Hashes


def _read_contents(
    examples: Iterable[Example], config: SplitConfig, on_progress: Callable[[int], None] | None
) -> _Contents:
    contents = _Contents()
    labels = _LabelReader(config.label)
    rows = iter(examples)
    sample = _take_sample(rows)
    view = _choose_view([_texts(example, config.label) for example in sample])
    for number, example in enumerate(chain(sample, rows), 1):
        texts = _compared(_texts(example, config.label), view)
        content = contents.keys.setdefault(_key(texts), len(contents.keys))
        if config.near_duplicate_similarity is not None and content * SIGNATURE_BYTES == len(contents.signature_bytes):
            contents.signature_bytes += _signature(_shingles(" ".join(texts.values()), view)).tobytes()
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
    """Return the contents by name, without the label, in lower case and with white space folded."""
    texts = {name: _fold(value) for name, value in example.fields.items() if name != label}
    if example.messages:
        texts[MESSAGES] = _fold("\n".join(f"{message.role} {message.content}" for message in example.messages))
    return texts


def _fold(value: Any) -> str:
    if value is None:
        return ""
    return " ".join((value if isinstance(value, str) else canonical_json(value)).casefold().split())


def _key(texts: Mapping[str, str]) -> bytes:
    return blake2b(canonical_json(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _compared(texts: Mapping[str, str], view: _View) -> dict[str, str]:
    if view.fields is None:
        return dict(texts)
    chosen = {name: text for name, text in texts.items() if name in view.fields}
    return chosen if any(chosen.values()) else dict(texts)


def _choose_view(sample: Sequence[Mapping[str, str]]) -> _View:
    nothing = np.empty(0, np.uint64)
    fields = _text_fields(sample)
    everything = {_key(texts) for texts in sample}
    different = {_key(_compared(texts, _View(fields, 1, nothing))) for texts in sample}
    # Where the text hardly differs (one question, two numbers), the other fields are what makes an example.
    if len(different) * 5 < len(everything):
        fields = None
    joined = {" ".join(_compared(texts, _View(fields, 1, nothing)).values()) for texts in sample}
    words = [_word_hashes(text) for text in joined]
    common = _common_runs(words)
    lengths = sorted(len(_without_runs(hashes, common)) for hashes in words)
    return _View(fields, _shingle_words(lengths[len(lengths) // 2] if lengths else 0), common)


def _text_fields(sample: Sequence[Mapping[str, str]]) -> frozenset[str] | None:
    present: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for row in sample:
        present.update(row.keys())
        texts.update(name for name, text in row.items() if _is_text(text))
    return frozenset(name for name, count in texts.items() if count * 2 >= present[name]) or None


def _is_text(text: str) -> bool:
    return len(_LETTERS.findall(text)) >= 2 and (" " in text or (len(text) >= 10 and not text.isascii()))


def _shingle_words(median_words: int) -> int:
    """Return how many words make a shingle: so few that one word changed in ten leaves two texts alike (0.8)."""
    if median_words < 20:
        return 1
    return 2 if median_words < 30 else 3


def _common_runs(texts: Sequence[Hashes]) -> Hashes:
    """Return the runs of three words that more than a fifth of the different texts share, sorted."""
    counts: Counter[int] = Counter()
    for hashes in texts:
        counts.update(np.unique(_runs(hashes, 3)).tolist())
    least = max(COMMON_SHARE * len(texts), COMMON_EXAMPLES)
    return np.array(sorted(run for run, count in counts.items() if count > least), np.uint64)


# Shingles and signatures


def _mix(values: Hashes) -> Hashes:
    """Scatter 64-bit values (the finalizer of SplitMix64; Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_FACTORS = _mix(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64)) | np.uint64(1)
_OFFSETS = _mix(np.arange(1_001, PERMUTATIONS + 1_001, dtype=np.uint64))


def _word_hashes(text: str) -> Hashes:
    words = _WORD.findall(text) or [text]
    codes = (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words)
    return np.fromiter(codes, np.uint64, len(words))


def _runs(words: Hashes, length: int) -> Hashes:
    """Return a hash of each run of ``length`` words; a shorter text is one run."""
    length = min(length, len(words))
    count = len(words) - length + 1
    runs = words[:count]
    for offset in range(1, length):
        runs = _mix(runs) + words[offset : offset + count]
    return runs


def _without_runs(words: Hashes, common: Hashes) -> Hashes:
    """Leave out the words of common runs, unless nothing else is there."""
    if not len(common) or len(words) < 3:
        return words
    runs = _runs(words, 3)
    places = np.searchsorted(common, runs).clip(max=len(common) - 1)
    starts = np.flatnonzero(common[places] == runs)
    kept = np.ones(len(words), bool)
    for offset in range(3):
        kept[starts + offset] = False
    return words[kept] if kept.any() else words


def _shingles(text: str, view: _View) -> Hashes:
    """Return the shingles as a set of hashes; a shingle met again is another member, so "no no" is not "no"."""
    runs = np.sort(_runs(_without_runs(_word_hashes(text), view.common_runs), view.shingle_words))
    positions = np.arange(len(runs), dtype=np.uint64)
    first = np.concatenate(([True], runs[1:] != runs[:-1]))
    repeats = positions - np.maximum.accumulate(np.where(first, positions, np.uint64(0)))
    return _mix(_mix(runs) + repeats)


def _signature(shingles: Hashes) -> Signatures:
    """Return the MinHash signature: for each of 128 hash functions, the low 16 bits of its least value.

    Sixteen bits agree by chance once in 65,536 (b-bit minwise hashing; Li and König 2010): more functions in the same
    memory estimate the similarity better.
    """
    least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint64)
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):
        part = shingles[start : start + SHINGLES_AT_ONCE, None]
        least = np.minimum(least, ((part * _FACTORS + _OFFSETS) >> np.uint64(32)).min(axis=0))
    return least.astype(np.uint16)


# Near duplicates


def _join_near_duplicates(signatures: Signatures, similarity: float | None, contents: int) -> list[int]:
    """Return for each content the first content of its group."""
    roots = list(range(contents))
    if similarity is not None and contents > 1:
        # One standard error of the estimate in favour of alike: a pair kept together costs less than one torn apart.
        least = (similarity - (similarity * (1 - similarity) / PERMUTATIONS) ** 0.5) * PERMUTATIONS
        rows = _rows_per_band(similarity)
        for start in range(0, PERMUTATIONS - rows + 1, rows):
            for one, other in _alike_pairs(signatures, signatures[:, start : start + rows], least):
                _join(roots, one, other)
    return [_root(roots, content) for content in range(contents)]


def _rows_per_band(similarity: float) -> int:
    """Return the most rows of a band under which an alike pair still shares one in 99 cases of 100.

    With b bands of r rows that chance is 1 - (1 - s^r)^b at similarity s.
    """
    for rows in range(16, 1, -1):
        if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= BAND_RECALL:
            return rows
    return 1


def _alike_pairs(signatures: Signatures, band: Signatures, least: float) -> Iterator[tuple[int, int]]:
    """Yield the pairs that agree in one band and in at least ``least`` places of the whole signature."""
    hashes = np.zeros(len(band), np.uint64)
    for column in band.T:
        hashes = _mix(hashes + column)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.concatenate(([True], hashes[1:] != hashes[:-1]))
    run_start = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    places = np.flatnonzero(~starts)
    for offset in range(1, WINDOW):
        near = places[places - offset >= run_start[places]]
        yield from _confirmed(signatures, order[near], order[near - offset], least)
    far = places[places - WINDOW >= run_start[places]]
    yield from _confirmed(signatures, order[far], order[run_start[far]], least)


def _confirmed(signatures: Signatures, ones: Indices, others: Indices, least: float) -> Iterator[tuple[int, int]]:
    for start in range(0, len(ones), PAIRS_AT_ONCE):
        one, other = ones[start : start + PAIRS_AT_ONCE], others[start : start + PAIRS_AT_ONCE]
        alike = (signatures[one] == signatures[other]).sum(axis=1) >= least
        yield from zip(one[alike].tolist(), other[alike].tolist(), strict=True)


def _root(roots: list[int], content: int) -> int:
    while roots[content] != content:
        roots[content] = roots[roots[content]]
        content = roots[content]
    return content


def _join(roots: list[int], one: int, other: int) -> None:
    first, second = sorted((_root(roots, one), _root(roots, other)))
    roots[second] = first


# Groups and sides


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
        hint="add examples that differ, or raise near_duplicate_similarity" if len(contents.of_row) >= sides else None,
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
    )
