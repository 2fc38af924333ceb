"""A weight matrix as it is held: whole, or in few bits. All that is asked of it are products, forward and back.

Names end in their dimensions: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.llm.engine.layer_operations import Adapter, LayerOperations


class HeldWeight(ABC):
    """A frozen weight (O, I), in whatever numbers. Products come in the number type of what is multiplied."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The outputs and the inputs."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """The memory that it takes, in bytes."""

    @abstractmethod
    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (O, I) that it stands for, rounded once to ``dtype``."""

    @abstractmethod
    def to(self, device: torch.device) -> HeldWeight:
        """Return the same weight on another device; the numbers that it is held in stay as they are."""

    def times(self, x_TI: torch.Tensor, onto_TO: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W' (T, O); ``onto`` is overwritten with its sum with that."""
        weight_OI = self.whole(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI) if onto_TO is None else onto_TO.addmm_(x_TI, weight_OI.T)

    def adapted(
        self, x_TI: torch.Tensor, adapters: Sequence[Adapter], do: LayerOperations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x W' + s (x A') B' (T, O), with low-rank adapters of its outputs, and x A' (T, R).

        What an adapter adds is far smaller than what it is added to, at first: rounded to bfloat16, a sum would lose
        it. So it is made first, and the large product is added onto it, which rounds once.
        """
        y_TO, low_TR = do.adapt(x_TI, adapters, self.shape[0])
        return self.times(x_TI, y_TO), low_TR

    def adapted_back(
        self, dy_TO: torch.Tensor, adapters: Sequence[Adapter], do: LayerOperations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of the input of :meth:`adapted` (T, I), and of x A' (T, R)."""
        dx_TI, dlow_TR = do.adapt_backward(dy_TO, adapters)
        return self.times_back(dy_TO, dx_TI), dlow_TR

    def times_into(self, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Write x W' into ``y``, so that large products need no new memory."""
        torch.mm(x_TI, self.whole(x_TI.dtype).T, out=y_TO)

    def times_back(self, dy_TO: torch.Tensor, onto_TI: torch.Tensor | None = None) -> torch.Tensor:
        """Return dy W (T, I), the gradient of the input; ``onto`` is overwritten with its sum with that."""
        weight_OI = self.whole(dy_TO.dtype)
        return dy_TO @ weight_OI if onto_TI is None else onto_TI.addmm_(dy_TO, weight_OI)


@dataclass(frozen=True)
class WholeWeight(HeldWeight):
    """A weight as it is, without its gradient."""

    weight_OI: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """See :attr:`HeldWeight.shape`."""
        outputs, inputs = self.weight_OI.shape
        return outputs, inputs

    @property
    def device(self) -> torch.device:
        """See :attr:`HeldWeight.device`."""
        return self.weight_OI.device

    @property
    def bytes(self) -> int:
        """See :attr:`HeldWeight.bytes`."""
        return self.weight_OI.nbytes

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`HeldWeight.whole`."""
        return self.weight_OI.to(dtype)

    def to(self, device: torch.device) -> WholeWeight:
        """See :meth:`HeldWeight.to`."""
        return WholeWeight(self.weight_OI.to(device))


@dataclass(frozen=True)
class StackedWeights(HeldWeight):
    """Weights with the same inputs, one below the other; they are made whole together where they are multiplied."""

    parts: Sequence[HeldWeight]

    @property
    def shape(self) -> tuple[int, int]:
        """See :attr:`HeldWeight.shape`."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def device(self) -> torch.device:
        """See :attr:`HeldWeight.device`."""
        return self.parts[0].device

    @property
    def bytes(self) -> int:
        """See :attr:`HeldWeight.bytes`."""
        return sum(part.bytes for part in self.parts)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`HeldWeight.whole`."""
        return torch.cat([part.whole(dtype) for part in self.parts])

    def to(self, device: torch.device) -> StackedWeights:
        """See :meth:`HeldWeight.to`."""
        return StackedWeights([part.to(device) for part in self.parts])
