"""Bins are those of the plain algorithms, found faster."""

from __future__ import annotations

import random

import pytest

from luthier.llm.rows import _first_fit


def first_fit(sizes: list[int], room_per_bin: int) -> list[list[int]]:
    """Return first fit by decreasing length, as a textbook has it."""
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = (bin for bin in bins if sum(sizes[i] for i in bin) + sizes[index] <= room_per_bin)
        bin = next(fitting, None)
        if bin is None:
            bins.append([index])
        else:
            bin.append(index)
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_filled_first_fit_by_decreasing_length(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(10):
        sizes = [draw.randrange(1, 120) for _ in range(draw.randrange(50))]
        room = draw.randrange(-5, 150)  # what is longer than a row, or a prefix, has a row of its own
        assert _first_fit(sizes, room) == first_fit(sizes, room)
