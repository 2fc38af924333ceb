"""Products with frozen weights in 8-bit integers: many processors multiply those four times as fast as float32.

A weight W (O, I) is held as integers C with one scale s for each output, so that W = diag(s) C H with the orthogonal
Walsh-Hadamard matrix H of blocks of its inputs. An input becomes integers with one scale for each row, turned by H
first, and a product is made in int32, exactly (sums of 133,000 products of the largest numbers fit):
x W' = (x H) C' diag(s). The way back uses the same integers:
dy W = ((dy diag(s)) C) H. H spreads outliers, of which a model's hidden states have many, over their block: that is
what keeps 8 bits good enough (Ashkboos et al. 2024, arXiv 2404.00456; Wortsman et al. 2023, arXiv 2304.13013, train
with such products). What is added, attended, learned and stepped stays in float32.

Names end in their dimensions: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from luthier.llm.engine.held_weight import HeldWeight
from luthier.llm.engine.layer_operations import FINER, Adapter, IntegerSums, LayerOperations
from luthier.llm.engine.native_operations import operations_for


@dataclass(frozen=True)
class IntegerWeight(HeldWeight):
    """A weight matrix as int8 codes (O, I) of its turned rows, with one float32 scale for each output (O,).

    With ``fine`` gradients are multiplied in two parts of 8 bits: those of a softmax have thousands of numbers far
    below the greatest, which count together.
    """

    codes_OI: torch.Tensor
    scales_O: torch.Tensor
    fine: bool = False

    @classmethod
    def of(cls, weight_OI: torch.Tensor, *, fine: bool = False) -> IntegerWeight:
        """Return a weight matrix as integers."""
        do = operations_for(torch.float32, weight_OI.device)
        return cls(*do.to_integers(weight_OI.float().contiguous(), _block(weight_OI)), fine)

    @classmethod
    def stacked(cls, parts: Sequence[IntegerWeight]) -> IntegerWeight:
        """Return weights with the same inputs, one below the other."""
        codes_OI, scales_O = (torch.cat(some) for some in zip(*((p.codes_OI, p.scales_O) for p in parts), strict=True))
        return cls(codes_OI, scales_O, parts[0].fine)

    def rows(self, outputs: slice) -> IntegerWeight:
        """Return some of the outputs, as a view."""
        return IntegerWeight(self.codes_OI[outputs], self.scales_O[outputs], self.fine)

    @property
    def shape(self) -> tuple[int, int]:
        """See :attr:`HeldWeight.shape`."""
        outputs, inputs = self.codes_OI.shape
        return outputs, inputs

    @property
    def device(self) -> torch.device:
        """See :attr:`HeldWeight.device`."""
        return self.codes_OI.device

    @property
    def bytes(self) -> int:
        """See :attr:`HeldWeight.bytes`."""
        return self.codes_OI.nbytes + self.scales_O.nbytes

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`HeldWeight.whole`."""
        weight_OI = torch.empty(self.shape, dtype=dtype, device=self.device)
        of = IntegerSums(self.codes_OI.int(), self.scales_O, block=_block(self.codes_OI))
        operations_for(dtype, self.device).from_integers(weight_OI, of)
        return weight_OI

    def to(self, device: torch.device) -> IntegerWeight:
        """See :meth:`HeldWeight.to`."""
        return IntegerWeight(self.codes_OI.to(device), self.scales_O.to(device), self.fine)

    def times(self, x_TI: torch.Tensor, onto_TO: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`HeldWeight.times`."""
        y_TO = x_TI.new_empty(len(x_TI), len(self.codes_OI)) if onto_TO is None else onto_TO
        do = operations_for(x_TI.dtype, x_TI.device)
        do.from_integers(y_TO, self._sums(x_TI, do), add=onto_TO is not None)
        return y_TO

    def times_into(self, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See :meth:`HeldWeight.times_into`."""
        do = operations_for(x_TI.dtype, x_TI.device)
        do.from_integers(y_TO, self._sums(x_TI, do, y_TO.view(torch.int32)))

    def times_back(self, dy_TO: torch.Tensor, onto_TI: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`HeldWeight.times_back`."""
        dx_TI = dy_TO.new_empty(len(dy_TO), self.codes_OI.shape[1]) if onto_TI is None else onto_TI
        do = operations_for(dy_TO.dtype, dy_TO.device)
        fine_TO = torch.empty(dy_TO.shape, dtype=torch.int8, device=self.device) if self.fine else None
        sums = self._sums_back(dy_TO, do, fine_TO)
        do.from_integers(dx_TI, sums, add=onto_TI is not None)
        if fine_TO is not None:
            torch._int_mm(fine_TO, self.codes_OI, out=sums.sums_TW)
            do.from_integers(dx_TI, replace(sums, scales_T=sums.scales_T / FINER), add=True)
        return dx_TI

    def adapted(
        self, x_TI: torch.Tensor, adapters: Sequence[Adapter], do: LayerOperations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`HeldWeight.adapted`."""
        return do.adapt(x_TI, adapters, len(self.codes_OI), self._sums(x_TI, do))

    def adapted_back(
        self, dy_TO: torch.Tensor, adapters: Sequence[Adapter], do: LayerOperations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`HeldWeight.adapted_back`."""
        return do.adapt_backward(dy_TO, adapters, self._sums_back(dy_TO, do))

    def _sums(self, x_TI: torch.Tensor, do: LayerOperations, sums_TO: torch.Tensor | None = None) -> IntegerSums:
        if sums_TO is None:
            sums_TO = torch.empty(len(x_TI), len(self.codes_OI), dtype=torch.int32, device=self.device)
        codes_TI, scales_T = do.to_integers(x_TI, _block(x_TI))
        torch._int_mm(codes_TI, self.codes_OI.T, out=sums_TO)
        return IntegerSums(sums_TO, scales_T, self.scales_O)

    def _sums_back(self, dy_TO: torch.Tensor, do: LayerOperations, fine_TO: torch.Tensor | None = None) -> IntegerSums:
        codes_TO, scales_T = do.to_integers(dy_TO, times_I=self.scales_O, fine_TI=fine_TO)
        sums_TI = torch.empty(len(dy_TO), self.codes_OI.shape[1], dtype=torch.int32, device=self.device)
        torch._int_mm(codes_TO, self.codes_OI, out=sums_TI)
        return IntegerSums(sums_TI, scales_T, block=_block(self.codes_OI))


def _block(values_TI: torch.Tensor) -> int:
    """Return the numbers of a block that are turned together: the largest power of two that divides the inputs."""
    inputs = values_TI.shape[1]
    return inputs & -inputs
