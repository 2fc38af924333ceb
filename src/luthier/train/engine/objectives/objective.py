"""The socket of a training method: units (examples, pairs) in, the loss of their batch out, in parts that fit memory.

A batch's loss is a weighted mean over its units. An objective gives it in parts that add up to it exactly, each a
function that computes it with a graph of its own: the loop calls one, goes backward through it, and calls the next.
Gradients add up to those of the whole batch, however it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

U = TypeVar("U", contravariant=True)
OnProgress = Callable[[str, float], None]
"""Hears what is being done and which share of it is done."""


@dataclass(frozen=True)
class PartLoss:
    """A part's share of its batch's mean loss, and sums for metrics: name → (weighted sum, sum of weights)."""

    loss: torch.Tensor
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


Part = Callable[[], PartLoss]
"""Computes a part of a batch's loss. Parts know nothing of each other."""


class Objective(Protocol[U]):
    """One training method over a model that it was made with."""

    def prepare(self, units: Sequence[U], folder: Path, fingerprint: str, on_progress: OnProgress) -> None:
        """Compute what stays the same during training, once, before its first step; ``folder`` keeps it.

        ``units`` are all that there are, on every side; they may be more than memory holds.
        """

    def losses(self, units: Sequence[U], *, training: bool) -> list[Part]:
        """Return the parts of a batch's loss."""


def total_weight(weights: Iterable[float]) -> float:
    """Return what a batch's weighted sum is divided by: the sum of the weights, or 1 where all of them are 0."""
    return sum(weights) or 1.0


def sum_by_owner(values_M: torch.Tensor, owners: Sequence[int], examples: int) -> torch.Tensor:
    """Return the sum of each example's values, (N,); differentiable."""
    owners_M = torch.tensor(owners, device=values_M.device)
    return torch.zeros(examples, device=values_M.device).index_add(0, owners_M, values_M)
