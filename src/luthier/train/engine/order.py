"""The order in which units are learned: it follows from seed and step alone, so a checkpoint need not hold it."""

from __future__ import annotations

import math

import torch

from luthier.records.training import Resolved


class Order:
    """Every pass is a new permutation that depends on the seed and the number of the pass."""

    def __init__(self, units: int, resolved: Resolved) -> None:
        self._units = units
        self._batch_size = resolved.batch_size
        self._seed = resolved.seed
        self._total = math.ceil(units * resolved.epochs)
        self._permutations: dict[int, torch.Tensor] = {}

    def batch(self, step: int) -> list[int]:
        """Return the indices of the units of a step (from 0); a batch may span two passes."""
        first = step * self._batch_size
        last = min(first + self._batch_size, max(self._total, first + 1))
        return [int(self._permutation(visit // self._units)[visit % self._units]) for visit in range(first, last)]

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(self._units, generator=generator)
            # A batch may span two passes; older ones are not asked for again.
            self._permutations = {k: v for k, v in self._permutations.items() if k == epoch - 1} | {epoch: order}
        return self._permutations[epoch]
