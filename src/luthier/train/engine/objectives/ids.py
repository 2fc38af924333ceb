"""Finds units by their ids without holding the ids: a run may have more units than memory holds names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

KEY_BYTES = 16  # of an id's hash: no two of 10^15 ids share one


class IdIndex:
    """The places of units by id, of which some may be there several times: 32 bytes an id.

    Names end in their dimensions: N units, U different ids. These are numbered in the order of their first units.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        keys_N = _keys(ids)
        self._keys_U, first_U = np.unique(keys_N, return_index=True)
        _, from_behind_U = np.unique(keys_N[::-1], return_index=True)
        by_first_U = first_U.argsort()
        self._numbers_U = np.empty_like(by_first_U)
        self._numbers_U[by_first_U] = np.arange(len(by_first_U))
        self.places_U = (len(keys_N) - 1 - from_behind_U)[by_first_U]
        """The place of each id's last unit."""

    def __len__(self) -> int:
        return len(self.places_U)

    def numbers(self, ids: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return which of the different ids each one is.

        Raises:
            KeyError: one of them is not there.
        """
        keys = _keys(ids)
        found = np.searchsorted(self._keys_U, keys)
        known = found < len(self)
        known[known] = self._keys_U[found[known]] == keys[known]
        if not known.all():
            raise KeyError(ids[int(known.argmin())])
        return self._numbers_U[found]

    def places(self, ids: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return the place of each id's last unit.

        Raises:
            KeyError: one of them is not there.
        """
        return self.places_U[self.numbers(ids)]


def _keys(ids: Iterable[str]) -> np.ndarray[Any, Any]:
    keys = bytearray()
    for example_id in ids:
        keys += blake2b(example_id.encode(), digest_size=KEY_BYTES).digest()
    return np.frombuffer(keys, f"S{KEY_BYTES}")
