"""Show some groups of examples more often, or less often, than they stand in the data.

In: examples, the group of each, and a factor for each group. Out: the examples as they are to be trained on, some of
them several times, and what became of each group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from luthier.errors import InputError, did_you_mean
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


def resample(
    examples: Sequence[Example],
    group_of: str | Callable[[Example], str],
    factors: Mapping[str, float] | Literal["balanced"],
    seed: int = 0,
) -> tuple[list[Example], list[ResampledGroup]]:
    """Return examples repeated or left out by the factor of their group, in their order, and each group's sizes.

    A factor of 2.5 takes each example twice and half of them a third time; 0.3 takes 30 %. Which ones is decided by
    the seed and the examples' ids, not by their order. A group in which anything is to be kept keeps one example at
    least. A group without a factor stays as it is. ``"balanced"`` brings every group to the size of the largest, but
    repeats none more than ten times.

    Args:
        examples: What to sample from.
        group_of: The field that names the group, or a function that does.
        factors: A factor of 0 or more for groups by name, or ``"balanced"``.
        seed: The same seed gives the same examples.

    Raises:
        InputError: examples without a group, names of groups that do not exist, factors that are negative or not
            finite, or nothing is left.
    """
    if not examples:
        raise InputError("There are no examples to sample from.")
    groups = _groups(examples, group_of)
    chosen = _balancing(groups) if factors == "balanced" else _checked(factors, groups)
    copies = [0] * len(examples)
    report: list[ResampledGroup] = []
    for name, members in groups.items():
        wanted = chosen.get(name, 1.0)
        factor = min(wanted, MAX_BALANCING_FACTOR) if factors == "balanced" else wanted
        ranked = sorted(members, key=lambda index: _rank(examples[index], seed))
        after = _size_after(len(members), factor)
        for place, index in enumerate(ranked):
            copies[index] = after // len(members) + (place < after % len(members))
        report.append(ResampledGroup(name, factor, len(members), after, capped=factor < wanted))
    taken = [example for example, count in zip(examples, copies, strict=True) for _ in range(count)]
    if not taken:
        raise InputError("No example is left: every group that there is has the factor 0.")
    return taken, sorted(report, key=lambda group: group.name)


def _groups(examples: Sequence[Example], group_of: str | Callable[[Example], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    missing: list[str] = []
    for index, example in enumerate(examples):
        name = _text(example.fields.get(group_of)) if isinstance(group_of, str) else group_of(example)
        if not name:
            missing.append(f"example {example.id} has no group")
        groups.setdefault(name, []).append(index)
    if isinstance(group_of, str) and len(missing) == len(examples):
        known = {name for example in examples for name in example.fields}
        raise InputError(f"There is no field {group_of!r} to take the groups from.{did_you_mean(group_of, known)}")
    if missing:
        raise InputError(
            f"{len(missing):,} of {len(examples):,} examples have no group.",
            problems=missing,
            hint="fill the group in, or leave these rows out of the dataset",
        )
    return groups


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else canonical_json(value)


def _balancing(groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    largest = max(map(len, groups.values()))
    return {name: largest / len(members) for name, members in groups.items()}


def _checked(factors: Mapping[str, float], groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
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


def _rank(example: Example, seed: int) -> bytes:
    return blake2b(f"{seed} {example.id}".encode(), digest_size=8).digest()
