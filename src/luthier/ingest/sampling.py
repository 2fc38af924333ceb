"""Show some groups of examples more often, or less often, than they stand in the data.

In: examples, the group of each, and a factor for each group. Out: the examples as they are to be trained on, some of
them several times, and what became of each group. Examples are read twice and never held: once to count how often each
is taken, and once to take them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import repeat
from typing import Any, Literal

import numpy as np

from luthier.errors import PROBLEMS_KEPT, InputError, did_you_mean
from luthier.records.example import Example
from luthier.records.record import canonical_json

MAX_BALANCING_FACTOR = 10.0


@dataclass(frozen=True)
class ResampledGroup:
    """A group's factor, and its examples before and after.

    ``capped`` says that balancing would have needed a factor of more than ten.
    """

    name: str
    factor: float
    before: int
    after: int
    capped: bool = False


@dataclass(frozen=True)
class Repeated:
    """Examples, each of them as often as ``copies`` says, in their order; the examples are read whenever these are."""

    examples: Iterable[Example]
    copies: np.ndarray[Any, Any]

    def __iter__(self) -> Iterator[Example]:
        for example, count in zip(self.examples, self.copies, strict=True):
            yield from repeat(example, int(count))


def resample(
    examples: Iterable[Example],
    group_of: str | Callable[[Example], str],
    factors: Mapping[str, float] | Literal["balanced"],
    seed: int = 0,
) -> tuple[Repeated, list[ResampledGroup]]:
    """Return examples repeated or left out by the factor of their group, in their order, and each group's sizes.

    A factor of 2.5 takes each example twice and half of them a third time; 0.3 takes 30 %. Which ones is decided by
    the seed and the examples' ids, not by their order. A group in which anything is to be kept keeps one example at
    least. A group without a factor stays as it is. ``"balanced"`` brings every group to the size of the largest, but
    repeats none more than ten times.

    Args:
        examples: What to sample from: read now, and again whenever what is returned is. Some 60 bytes are held of each
            while they are counted, and afterwards one, or as many as the largest count takes.
        group_of: The field that names the group, or a function that does.
        factors: A factor of 0 or more for groups by name, or ``"balanced"``.
        seed: The same seed gives the same examples.

    Raises:
        InputError: examples without a group, names of groups that do not exist, factors that are negative or not
            finite, or nothing is left.
    """
    places, ranks, groups = _read(examples, group_of, seed)
    if not len(groups):
        raise InputError("There are no examples to sample from.")
    sizes = dict(zip(places, np.bincount(groups).tolist(), strict=True))
    chosen = _balancing(sizes) if factors == "balanced" else _checked(factors, sizes)
    report: list[ResampledGroup] = []
    for name, size in sizes.items():
        wanted = chosen.get(name, 1.0)
        factor = min(wanted, MAX_BALANCING_FACTOR) if factors == "balanced" else wanted
        report.append(ResampledGroup(name, factor, size, _size_after(size, factor), capped=factor < wanted))
    if not any(group.after for group in report):
        raise InputError("No example is left: every group that there is has the factor 0.")
    copies = _copies(groups, ranks, [group.after for group in report])
    return Repeated(examples, copies), sorted(report, key=lambda group: group.name)


def _read(
    examples: Iterable[Example], group_of: str | Callable[[Example], str], seed: int
) -> tuple[dict[str, int], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the number of each group by name, the rank (N,) of each example, and the number (N,) of its group."""
    places: dict[str, int] = {}
    ranks, groups = array("Q"), array("i")
    missing, problems, known = 0, list[str](), set[str]()
    for example in examples:
        name = _text(example.fields.get(group_of)) if isinstance(group_of, str) else group_of(example)
        ranks.append(_rank(example, seed))
        groups.append(places.setdefault(name, len(places)))
        if not name:
            missing += 1
            known.update(example.fields)
            if len(problems) < PROBLEMS_KEPT:
                problems.append(f"example {example.id} has no group")
    if isinstance(group_of, str) and missing and missing == len(groups):
        raise InputError(f"There is no field {group_of!r} to take the groups from.{did_you_mean(group_of, known)}")
    if missing:
        raise InputError(
            f"{missing:,} of {len(groups):,} examples have no group.",
            problems=problems,
            hint="fill the group in, or leave these rows out of the dataset",
        )
    return places, np.asarray(ranks), np.asarray(groups)


def _copies(groups: np.ndarray[Any, Any], ranks: np.ndarray[Any, Any], after: list[int]) -> np.ndarray[Any, Any]:
    """Return how often each of N examples is taken, (N,), so that each group has its size ``after``.

    The copies of a group are shared out evenly; those left over go to the examples of the lowest ranks.
    """
    sizes = np.bincount(groups)
    each, left_over = np.divmod(np.array(after, np.int64), sizes)
    order = np.lexsort((ranks, groups))  # by group, and then by rank; what has the same rank stays in its order
    copies = np.empty_like(order)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    copies[order] = np.repeat(each, sizes) + (place < np.repeat(left_over, sizes))
    return copies.astype(np.min_scalar_type(copies.max()))


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else canonical_json(value)


def _balancing(sizes: Mapping[str, int]) -> dict[str, float]:
    largest = max(sizes.values())
    return {name: largest / size for name, size in sizes.items()}


def _checked(factors: Mapping[str, float], groups: Mapping[str, int]) -> Mapping[str, float]:
    problems = [f"there is no group {name!r}.{did_you_mean(name, groups)}" for name in factors if name not in groups]
    problems += [
        f"{name!r} has the factor {factor}; it must be a finite number, 0 or more"
        for name, factor in factors.items()
        if not math.isfinite(factor) or factor < 0
    ]
    if problems:
        raise InputError("The groups cannot be sampled like this.", problems=problems)
    return factors


def _size_after(size: int, factor: float) -> int:
    return max(1, math.floor(size * factor + 0.5)) if factor else 0


def _rank(example: Example, seed: int) -> int:
    return int.from_bytes(blake2b(f"{seed} {example.id}".encode(), digest_size=8).digest())
