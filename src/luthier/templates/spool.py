"""Tokenized examples, and pairs of them, on disk: sequences that look like lists, for data that memory cannot hold.

Tokens, masks and offsets lie in plain arrays that are mapped into memory; ids in a text file with offsets of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from luthier.errors import NothingToLearnError
from luthier.templates.renderer import TokenizedExample, TokenizedPair

T = TypeVar("T")
TOKENS, MASK, IDS, INDEX = "tokens.u32", "mask.u8", "ids.txt", "index.npz"


class Lazy(Sequence[T]):
    """A sequence that holds nothing: each item is read when it is asked for."""

    @abstractmethod
    def read(self, place: int) -> T:
        """Return the item at a place from the beginning."""

    def __iter__(self) -> Iterator[T]:
        return map(self.read, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        return list(map(self.read, places)) if isinstance(places, range) else self.read(places)


class Joined(Lazy[T]):
    """Sequences one behind the other, wherever their items lie."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self._parts)

    def read(self, place: int) -> T:
        """See :meth:`Lazy.read`."""
        part = bisect_right(self._ends, place)
        return self._parts[part][place - self._ends[part]]  # counted from the part's end


class Spooled(Lazy[T]):
    """Units on disk."""


class SpooledExamples(Spooled[TokenizedExample]):
    """Examples in a folder. What is asked for is read; nothing else is held but 36 bytes an example."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / INDEX) as index:
            self._ends, self._id_ends = index["ends"], index["id_ends"]
            self._weights, self._labels = index["weights"], index["labels"]
        self._tokens = np.memmap(folder / TOKENS, np.uint32, "r")
        self._mask = np.memmap(folder / MASK, np.uint8, "r")
        self._ids = np.memmap(folder / IDS, np.uint8, "r")

    @classmethod
    def write(cls, folder: Path, examples: Iterable[TokenizedExample]) -> SpooledExamples:
        """Write examples one by one into a folder, and return them.

        Raises:
            NothingToLearnError: there are none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        ends, id_ends, weights, labels = array("q"), array("q"), array("d"), array("d")
        with ExitStack() as stack:
            tokens, mask, ids = (stack.enter_context((folder / name).open("wb")) for name in (TOKENS, MASK, IDS))
            for example in examples:
                tokens.write(np.asarray(example.tokens, np.uint32).tobytes())  # tofile hides that a disk is full
                mask.write(np.asarray(example.loss_mask, np.uint8).tobytes())
                ids.write(example.example_id.encode())
                ends.append(tokens.tell() // 4)
                id_ends.append(ids.tell())
                weights.append(example.weight)
                labels.append(math.nan if example.label is None else example.label)
        if not ends:
            raise NothingToLearnError("No example is left to learn from.")
        held = {"ends": np.array(ends), "id_ends": np.array(id_ends)}
        np.savez(folder / INDEX, **held, weights=np.array(weights), labels=np.array(labels))  # type: ignore[arg-type]
        return cls(folder)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, place: int) -> TokenizedExample:
        """See :meth:`Lazy.read`."""
        span, id_span = _span(self._ends, place), _span(self._id_ends, place)
        label = float(self._labels[place])
        return TokenizedExample(
            self._ids[id_span].tobytes().decode(),
            self._tokens[span].tolist(),
            self._mask[span].astype(bool).tolist(),
            float(self._weights[place]),
            None if math.isnan(label) else label,
        )


class SpooledPairs(Spooled[TokenizedPair]):
    """Pairs in a folder: each is the chosen example, whose label is the margin, and then the rejected one."""

    def __init__(self, sides: SpooledExamples) -> None:
        self._sides = sides

    @classmethod
    def write(cls, folder: Path, pairs: Iterable[TokenizedPair]) -> SpooledPairs:
        """Write pairs one by one into a folder, and return them.

        Raises:
            NothingToLearnError: there are none.
        """
        sides = (side for pair in pairs for side in (replace(pair.chosen, label=pair.margin), pair.rejected))
        return cls(SpooledExamples.write(folder, sides))

    def __len__(self) -> int:
        return len(self._sides) // 2

    def read(self, place: int) -> TokenizedPair:
        """See :meth:`Lazy.read`."""
        chosen, rejected = self._sides[2 * place], self._sides[2 * place + 1]
        chosen, margin = replace(chosen, label=None), chosen.label or 0.0
        return TokenizedPair(chosen.example_id, chosen, rejected, chosen.weight, margin)


def _span(ends: np.ndarray[Any, Any], place: int) -> slice:
    return slice(int(ends[place - 1]) if place else 0, int(ends[place]))
