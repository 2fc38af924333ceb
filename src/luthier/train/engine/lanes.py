"""Parts of a batch's loss at the same time, on a processor: one thread prepares operations while another multiplies.

A part in one thread leaves cores idle: between two matrix products lie dozens of small operations, and what starts them
is Python. In two lanes of half the threads each, one part's small operations run beside the other's products. Each
lane adds its own gradients up, and the lanes are added in their order: the same numbers in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.records.objectives import PAIRED
from luthier.records.training import TrainingPlan
from luthier.train.engine.objectives.objective import Part

LANES = 2
Gradients = list[torch.Tensor | None]


@dataclass(frozen=True)
class PartOutcome:
    """The loss of a part as a number, and its sums for metrics."""

    loss: float
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


def lane_count(plan: TrainingPlan, device: torch.device, base: Any = None) -> int:
    """Return how many lanes a run uses, over a base with that ``config`` (of transformers).

    One on a GPU and on a single core; where all weights are trained, whose gradients are too large to have twice; where
    noise is drawn, in the base too, since the order of the draws decides the numbers; and where the longest examples
    side by side would be more tokens at once than are planned.
    """
    resolved = plan.resolved
    longest = plan.longest_example * (2 if resolved.method in PAIRED else 1)
    draws = resolved.lora_dropout > 0 or resolved.supervised.neftune_alpha > 0 or _drops(base)
    here = device.type == "cpu" and torch.get_num_threads() >= LANES
    fits = resolved.has_adapter and LANES * longest <= resolved.tokens_per_row
    return LANES if here and fits and not draws else 1


def _drops(config: Any) -> bool:
    """Return whether a base has dropouts of its own, as encoders and older decoders do, by any of their names."""
    values = config.to_dict() if config is not None else {}
    return any("drop" in name and isinstance(value, int | float) and value > 0 for name, value in values.items())


class Lanes:
    """Goes through parts and adds their gradients to those of the parameters.

    Args:
        count: How many parts are computed at the same time.
        parameters: What is trained.
    """

    def __init__(self, count: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._count = count
        self._parameters = list(parameters)

    def backward(self, parts: Sequence[Part]) -> list[PartOutcome]:
        """Return the outcomes of parts, in their order; their gradients are added to the parameters'."""
        if self._count == 1 or len(parts) == 1:
            return [_backward(part) for part in parts]
        lanes = [parts[first :: self._count] for first in range(self._count)]
        threads = torch.get_num_threads()
        each = max(1, threads // self._count)
        try:
            with ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(each,)) as pool:
                done = list(pool.map(self._lane, lanes))
        finally:
            torch.set_num_threads(threads)  # new threads take over what the last one said
        for gradients, _ in done:
            self._add(gradients)
        outcomes = [iter(found) for _, found in done]
        return [next(outcomes[index % self._count]) for index in range(len(parts))]

    def _lane(self, parts: Sequence[Part]) -> tuple[Gradients, list[PartOutcome]]:
        sums: Gradients = [None] * len(self._parameters)
        outcomes = []
        for part in parts:
            found = part()
            new = torch.autograd.grad(found.loss, self._parameters, allow_unused=True)
            sums = [_sum(old, gradient) for old, gradient in zip(sums, new, strict=True)]
            outcomes.append(PartOutcome(float(found.loss.detach()), found.sums))
        return sums, outcomes

    def _add(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None and gradient.stride() != parameter.stride():
                # Fused optimizers read a gradient as it lies in memory, and take it to lie as its parameter does.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = _sum(parameter.grad, gradient)


def forward(parts: Sequence[Part]) -> Iterator[PartOutcome]:
    """Yield the outcomes of parts, without gradients."""
    for part in parts:
        found = part()
        yield PartOutcome(float(found.loss.detach()), found.sums)


def _backward(part: Part) -> PartOutcome:
    found = part()
    found.loss.backward()
    return PartOutcome(float(found.loss.detach()), found.sums)


def _sum(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old.add_(new)
