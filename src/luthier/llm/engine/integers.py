"""Products with frozen weights in integers: forward in 16 bits, and gradients in 8.

Many processors multiply 16 bits up to twice, and 8 bits up to four times as fast as float32. A weight W (O, I) is held
in both widths, each with its own integers C and one scale s for each output: W = diag(s) C. An input becomes integers
with one scale for each row, and the product x W' = x C' diag(s) is made in int32. The way back is dy W = (dy diag(s))
C: rounding to 8 bits does little to the direction of a whole gradient (Wortsman et al. 2023, arXiv 2304.13013, train
with such products too). What is added, attended, learned and stepped stays in float32.

Sums are exact. Those of 16 bits fit whatever is multiplied (see ``to_int16``); those of 8 fit for 133,000 of the
largest numbers, and gradients over larger vocabularies have one large number among many small ones.

Names end in their dimensions: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from luthier.llm.engine.held_weight import HeldWeight
from luthier.llm.engine.layer_operations import FINER, Adapter, IntegerSums, LayerOperations
from luthier.llm.engine.native_operations import operations_for

AT_ONCE = 8192  # rows that become integers: a vocabulary may have hundreds of thousands


@dataclass(frozen=True)
class Codes:
    """A matrix (O, I) as integers of one width, with one float32 scale for each row (O,)."""

    codes_OI: torch.Tensor
    scales_O: torch.Tensor

    @classmethod
    def empty(cls, like_OI: torch.Tensor, dtype: torch.dtype) -> Codes:
        """Return the memory for a matrix of the same shape."""
        codes_OI = torch.empty(like_OI.shape, dtype=dtype, device=like_OI.device)
        return cls(codes_OI, torch.empty(len(like_OI), device=like_OI.device))

    def put(self, rows: slice, codes_RI: torch.Tensor, scales_R: torch.Tensor) -> None:
        """Overwrite some of the rows."""
        self.codes_OI[rows], self.scales_O[rows] = codes_RI, scales_R

    @classmethod
    def stacked(cls, parts: Sequence[Codes]) -> Codes:
        """Return matrices with rows of the same width, one below the other."""
        return cls(torch.cat([one.codes_OI for one in parts]), torch.cat([one.scales_O for one in parts]))

    def rows(self, outputs: slice) -> Codes:
        """Return some of the rows, as a view."""
        return Codes(self.codes_OI[outputs], self.scales_O[outputs])

    def to(self, device: torch.device) -> Codes:
        """Return the same on another device."""
        return Codes(self.codes_OI.to(device), self.scales_O.to(device))

    @property
    def bytes(self) -> int:
        """The memory that it takes, in bytes."""
        return self.codes_OI.nbytes + self.scales_O.nbytes


@dataclass(frozen=True)
class IntegerWeight(HeldWeight):
    """A weight matrix as int16 for products, and as int8 for their gradients.

    With ``fine`` gradients are multiplied in two parts of 8 bits: those of a softmax have thousands of numbers far
    below the greatest, which count together.
    """

    forward: Codes
    backward: Codes
    fine: bool = False

    @classmethod
    def of(cls, weight_OI: torch.Tensor, less_I: torch.Tensor | None = None, *, fine: bool = False) -> IntegerWeight:
        """Return a weight matrix as integers; ``less`` is taken from each row first."""
        do = operations_for(torch.float32, weight_OI.device)
        found = cls(Codes.empty(weight_OI, torch.int16), Codes.empty(weight_OI, torch.int8), fine)
        for first in range(0, len(weight_OI), AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            exact_OI = weight_OI[rows].float() if less_I is None else weight_OI[rows].float() - less_I
            found.forward.put(rows, *do.to_int16(exact_OI.contiguous()))
            found.backward.put(rows, *do.to_int8(exact_OI.contiguous()))
        return found

    @classmethod
    def stacked(cls, parts: Sequence[IntegerWeight]) -> IntegerWeight:
        """Return weights with the same inputs, one below the other."""
        forward, backward = [part.forward for part in parts], [part.backward for part in parts]
        return cls(Codes.stacked(forward), Codes.stacked(backward), parts[0].fine)

    def rows(self, outputs: slice) -> IntegerWeight:
        """Return some of the outputs, as a view."""
        return IntegerWeight(self.forward.rows(outputs), self.backward.rows(outputs), self.fine)

    @property
    def shape(self) -> tuple[int, int]:
        """See :attr:`HeldWeight.shape`."""
        outputs, inputs = self.forward.codes_OI.shape
        return outputs, inputs

    @property
    def device(self) -> torch.device:
        """See :attr:`HeldWeight.device`."""
        return self.forward.codes_OI.device

    @property
    def bytes(self) -> int:
        """See :attr:`HeldWeight.bytes`."""
        return self.forward.bytes + self.backward.bytes

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`HeldWeight.whole`."""
        return (self.forward.codes_OI * self.forward.scales_O[:, None]).to(dtype)

    def to(self, device: torch.device) -> IntegerWeight:
        """See :meth:`HeldWeight.to`."""
        return IntegerWeight(self.forward.to(device), self.backward.to(device), self.fine)

    def times(self, x_TI: torch.Tensor, onto_TO: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`HeldWeight.times`."""
        y_TO = x_TI.new_empty(len(x_TI), self.shape[0]) if onto_TO is None else onto_TO
        do = operations_for(x_TI.dtype, x_TI.device)
        do.from_integers(y_TO, self._sums(x_TI, do), add=onto_TO is not None)
        return y_TO

    def times_into(self, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See :meth:`HeldWeight.times_into`."""
        do = operations_for(x_TI.dtype, x_TI.device)
        do.from_integers(y_TO, self._sums(x_TI, do, y_TO.view(torch.int32)))

    def times_back(self, dy_TO: torch.Tensor, onto_TI: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`HeldWeight.times_back`."""
        dx_TI = dy_TO.new_empty(len(dy_TO), self.shape[1]) if onto_TI is None else onto_TI
        do = operations_for(dy_TO.dtype, dy_TO.device)
        fine_TO = torch.empty(dy_TO.shape, dtype=torch.int8, device=self.device) if self.fine else None
        sums = self._sums_back(dy_TO, do, fine_TO)
        do.from_integers(dx_TI, sums, add=onto_TI is not None)
        if fine_TO is not None:
            torch._int_mm(fine_TO, self.backward.codes_OI, out=sums.sums_TW)
            do.from_integers(dx_TI, replace(sums, scales_T=sums.scales_T / FINER), add=True)
        return dx_TI

    def adapted(
        self, x_TI: torch.Tensor, adapters: Sequence[Adapter], do: LayerOperations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`HeldWeight.adapted`."""
        return do.adapt(x_TI, adapters, self.shape[0], self._sums(x_TI, do))

    def adapted_back(
        self, dy_TO: torch.Tensor, adapters: Sequence[Adapter], do: LayerOperations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`HeldWeight.adapted_back`."""
        return do.adapt_backward(dy_TO, adapters, self._sums_back(dy_TO, do))

    def _sums(self, x_TI: torch.Tensor, do: LayerOperations, sums_TO: torch.Tensor | None = None) -> IntegerSums:
        if sums_TO is None:
            sums_TO = torch.empty(len(x_TI), self.shape[0], dtype=torch.int32, device=self.device)
        codes_TI, scales_T = do.to_int16(x_TI)
        do.multiply_int16(sums_TO, codes_TI, self.forward.codes_OI)
        return IntegerSums(sums_TO, scales_T, self.forward.scales_O)

    def _sums_back(self, dy_TO: torch.Tensor, do: LayerOperations, fine_TO: torch.Tensor | None = None) -> IntegerSums:
        codes_TO, scales_T = do.to_int8(dy_TO, self.backward.scales_O, fine_TO)
        sums_TI = torch.empty(len(dy_TO), self.shape[1], dtype=torch.int32, device=self.device)
        torch._int_mm(codes_TO, self.backward.codes_OI, out=sums_TI)
        return IntegerSums(sums_TI, scales_T)
