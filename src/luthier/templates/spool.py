"""Tokenized examples on disk: a sequence that looks like a list, for data sets that do not fit into memory.

Tokens, masks and offsets lie in plain arrays that are mapped into memory; ids in a text file with offsets of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import numpy as np

from luthier.errors import NothingToLearnError
from luthier.templates.renderer import TokenizedExample

TOKENS, MASK, IDS, INDEX = "tokens.u32", "mask.u8", "ids.txt", "index.npz"


class SpooledExamples(Sequence[TokenizedExample]):
    """Examples in a folder. What is asked for is read; nothing else is held but 28 bytes an example."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / INDEX) as index:
            self._ends, self._id_ends, self._weights = index["ends"], index["id_ends"], index["weights"]
        self._tokens = np.memmap(folder / TOKENS, np.uint32, "r")
        self._mask = np.memmap(folder / MASK, np.uint8, "r")
        self._ids = np.memmap(folder / IDS, np.uint8, "r")

    @classmethod
    def write(cls, folder: Path, examples: Iterable[TokenizedExample]) -> SpooledExamples:
        """Write examples one by one into a folder, and return them.

        Raises:
            InputError: there are none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        ends, id_ends, weights = array("q"), array("q"), array("d")
        with ExitStack() as stack:
            tokens, mask, ids = (stack.enter_context((folder / name).open("wb")) for name in (TOKENS, MASK, IDS))
            for example in examples:
                tokens.write(np.asarray(example.tokens, np.uint32).tobytes())  # tofile hides that a disk is full
                mask.write(np.asarray(example.loss_mask, np.uint8).tobytes())
                ids.write(example.example_id.encode())
                ends.append(tokens.tell() // 4)
                id_ends.append(ids.tell())
                weights.append(example.weight)
        if not ends:
            raise NothingToLearnError("No example is left to learn from.")
        np.savez(folder / INDEX, ends=np.array(ends), id_ends=np.array(id_ends), weights=np.array(weights))
        return cls(folder)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        span, id_span = _span(self._ends, place), _span(self._id_ends, place)
        return TokenizedExample(
            self._ids[id_span].tobytes().decode(),
            self._tokens[span].tolist(),
            self._mask[span].astype(bool).tolist(),
            float(self._weights[place]),
        )


def _span(ends: np.ndarray[Any, Any], place: int) -> slice:
    return slice(int(ends[place - 1]) if place else 0, int(ends[place]))
