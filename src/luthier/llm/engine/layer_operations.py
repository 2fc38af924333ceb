"""The operations of a decoder layer between its large matrix products, by torch: forward, and backward by formula.

:class:`~luthier.llm.engine.native_operations.NativeOperations` does the same in one pass each, on a processor.

Names end in their dimensions: T tokens, E model width, F intermediate width, X heads of one kind, C heads of all kinds,
D head width; I inputs and O outputs of layers with adapters, R their ranks, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.llm.engine.row_attention import Heads, attend, attend_backward
from luthier.llm.engine.row_layout import RowLayout

INT8_MAX = 127
INT16_MAX = 127 * 256 + 127  # the nearest multiple of 256 is 127 of them: its upper byte fits in an int8
INT16_NORM = 46_000  # below the root of 2**31, with room for what rounding adds to rows of up to 400,000 numbers
FINER = 254  # steps of what rounding leaves, in one of integers
LEAST = 1e-30  # the greatest magnitude that a row of zeros is taken to have
Rope = tuple[torch.Tensor, torch.Tensor]
"""The cosines and sines of each token's angles, (T, 1, D) each, in float32."""


@dataclass(frozen=True)
class Adapter:
    """The low-rank adapter of a layer among others that read the same input: its weights, and its place among theirs.

    ``down_RI`` and ``up_OR`` are the A and B of Hu et al. 2021 (arXiv 2106.09685), ``scale`` the factor on B A.
    """

    down_RI: torch.nn.Parameter
    up_OR: torch.nn.Parameter
    scale: float
    outputs: slice
    ranks: slice


@dataclass(frozen=True)
class IntegerSums:
    """Sums of products of integers, int32 (T, W), and what makes numbers of them.

    A row is multiplied by its scale of ``scales`` (T,), a column by its factor of ``times`` (W,).
    """

    sums_TW: torch.Tensor
    scales_T: torch.Tensor
    times_W: torch.Tensor | None = None


class LayerOperations:
    """What a layer does besides its large products; inputs and outputs are in the type that the layer computes in."""

    def norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return w x / rms(x) over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""
        # The product of narrow numbers and float32 ones is made in float32, without a copy of the narrow ones.
        scaled_TE = torch.mul(x_TE, inverse_rms(x_TE, epsilon))
        return scaled_TE.to(x_TE.dtype).mul_(weight_E.to(x_TE.dtype))

    def norm_backward(
        self,
        dy_TE: torch.Tensor,
        x_TE: torch.Tensor,
        weight_E: torch.Tensor,
        epsilon: float,
        onto_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the gradient of the norm's input, (w dy - x̂ mean(x̂ w dy)) / rms, added to ``onto``."""
        inverse_T1 = inverse_rms(x_TE, epsilon)
        scaled_TE = torch.mul(x_TE, inverse_T1)
        dscaled_TE = torch.mul(dy_TE, weight_E.float())
        mean_T1 = torch.linalg.vecdot(dscaled_TE, scaled_TE).unsqueeze(-1) / x_TE.shape[-1]
        dx_TE = dscaled_TE.addcmul_(scaled_TE, mean_T1, value=-1).mul_(inverse_T1).to(x_TE.dtype)
        return dx_TE if onto_TE is None else dx_TE.add_(onto_TE)

    def gated(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) up, (T, F), of the two halves."""
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate_TF).mul_(up_TF)

    def gated_backward(self, dy_TF: torch.Tensor, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """Return the gradients of gate and up, (T, 2 F), from that of silu(gate) up; ``dy`` becomes silu(gate) up."""
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        gated_TF = torch.nn.functional.silu(gate_TF)
        dgate_up_T2F = torch.empty_like(gate_up_T2F)
        dgate_TF, dup_TF = dgate_up_T2F.chunk(2, dim=-1)
        torch.mul(dy_TF, gated_TF, out=dup_TF)
        dgate_TF.copy_(torch.ops.aten.silu_backward(dy_TF.mul_(up_TF), gate_TF))
        torch.mul(gated_TF, up_TF, out=dy_TF)
        return dgate_up_T2F

    def rotate(self, heads_TXD: torch.Tensor, rope: Rope, *, back: bool = False) -> None:
        """Rotate heads by their tokens' positions, in place (Su et al. 2021, arXiv 2104.09864); ``back`` undoes it."""
        cos_T1D, sin_T1D = (part.to(heads_TXD.dtype) for part in rope)
        first_TXd, second_TXd = heads_TXD.clone().chunk(2, dim=-1)
        low_T1d, high_T1d = sin_T1D.chunk(2, dim=-1)
        sign = -1 if back else 1
        heads_TXD.mul_(cos_T1D)
        half = heads_TXD.shape[-1] // 2
        heads_TXD[..., :half].addcmul_(second_TXd, low_T1d, value=-sign)
        heads_TXD[..., half:].addcmul_(first_TXd, high_T1d, value=sign)

    def adapt(
        self, x_TI: torch.Tensor, adapters: Sequence[Adapter], outputs: int, base: IntegerSums | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what adapters add to the outputs of their layers, s (x A') B' (T, O), and x A' (T, R).

        The first has the ``base`` layers' outputs (T, O) in it where these are given; their memory may be taken.
        """
        low_TR = x_TI @ _down(adapters, x_TI.dtype).T
        y_TO = low_TR @ _up(adapters, outputs, x_TI.dtype).T
        if base is not None:
            self.from_integers(y_TO, base, add=True)
        return y_TO, low_TR

    def adapt_backward(
        self, dy_TO: torch.Tensor, adapters: Sequence[Adapter], base: IntegerSums | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of the input, through the adapters alone, and of x A', s dy B.

        The first has that through the ``base`` layers (T, I) in it where it is given; its memory may be taken.
        """
        dlow_TR = dy_TO @ _up(adapters, dy_TO.shape[-1], dy_TO.dtype)
        dx_TI = dlow_TR @ _down(adapters, dy_TO.dtype)
        if base is not None:
            self.from_integers(dx_TI, base, add=True)
        return dx_TI, dlow_TR

    def adapter_gradients(
        self,
        dy_TO: torch.Tensor,
        x_TI: torch.Tensor,
        low_TR: torch.Tensor,
        dlow_TR: torch.Tensor,
        adapters: Sequence[Adapter],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the gradients of each adapter's weights, (s dy B)' x and s dy' (x A')."""
        ddown_RI, dup_OR = dlow_TR.T @ x_TI, dy_TO.T @ low_TR
        return [
            (ddown_RI[one.ranks].to(one.down_RI.dtype), dup_OR[one.outputs, one.ranks].to(one.up_OR.dtype) * one.scale)
            for one in adapters
        ]

    def to_int8(
        self, x_TI: torch.Tensor, times_I: torch.Tensor | None = None, fine_TI: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row as int8 (T, I) and its scale (T,), in float32, so that their product is the row.

        Each column is multiplied by its factor of ``times`` first. A row's greatest magnitude becomes 127; what is not
        finite makes its scale NaN. ``fine``, int8 too, is overwritten with what rounding leaves, in steps of the scale
        over :data:`FINER`.
        """
        x_TI = x_TI.float() if times_I is None else x_TI.float() * times_I
        most_T1 = _most(x_TI)
        exact_TI = (x_TI * (INT8_MAX / most_T1)).nan_to_num_(posinf=0.0, neginf=0.0)
        codes_TI = exact_TI.round()
        if fine_TI is not None:
            fine_TI.copy_(exact_TI.sub_(codes_TI).mul_(FINER).round_())
        return codes_TI.to(torch.int8), most_T1[:, 0] / INT8_MAX + _broken(x_TI)

    def to_int16(self, x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row as int16 (T, I) and its scale (T,), as :meth:`to_int8` does.

        Before rounding a row is as long as :data:`INT16_NORM` (shorter where its greatest magnitude would pass
        :data:`INT16_MAX`): the sum of two rows' products is no more than the product of their lengths (Cauchy and
        Schwarz), and fits 32 bits.
        """
        x_TI = x_TI.float()
        most_T1 = _most(x_TI)
        length_T1 = torch.linalg.vector_norm(x_TI / most_T1, dim=1, keepdim=True)
        scale_T1 = most_T1 * (length_T1 / INT16_NORM).clamp_(min=1 / INT16_MAX)
        codes_TI = (x_TI / scale_T1).nan_to_num_(posinf=0.0, neginf=0.0).round_().to(torch.int16)
        return codes_TI, scale_T1[:, 0] + _broken(x_TI)

    def multiply_int16(self, sums_TO: torch.Tensor, codes_TI: torch.Tensor, weight_OI: torch.Tensor) -> None:
        """Write the products x W' of integers of :meth:`to_int16` into ``sums``, int32 (T, O), exactly."""
        (high_TI, low_TI), (high_OI, low_OI) = _bytes_of(codes_TI), _bytes_of(weight_OI)
        sums_TO.copy_(torch._int_mm(high_TI, high_OI.T)).mul_(256)  # sums wrap at 2**32 on the way; the last one fits
        sums_TO += torch._int_mm(high_TI, low_OI.T)
        sums_TO += torch._int_mm(low_TI, high_OI.T)
        sums_TO.mul_(256).add_(torch._int_mm(low_TI, low_OI.T))

    def from_integers(self, y_TW: torch.Tensor, of: IntegerSums, *, add: bool = False) -> None:
        """Write into ``y`` the numbers that sums of products of integers are, or add them there.

        Without ``add`` the sums may lie in the memory of ``y``.
        """
        found_TW = of.sums_TW * of.scales_T[:, None]
        if of.times_W is not None:
            found_TW *= of.times_W
        if add:
            y_TW += found_TW.to(y_TW.dtype)
        else:
            y_TW.copy_(found_TW)

    def attend(
        self, qkv_TCD: torch.Tensor, heads: Heads, layout: RowLayout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what each query head sees, (T, H, D), and what the way back needs besides: nothing here.

        Kernels keep the logarithm of what each softmax divides by, (T, H), in float32.
        """
        return attend(qkv_TCD, heads, layout), None

    def attend_backward(
        self,
        dout_THD: torch.Tensor,
        out_THD: torch.Tensor,
        log_sums_TH: torch.Tensor | None,
        qkv_TCD: torch.Tensor,
        heads: Heads,
        layout: RowLayout,
    ) -> torch.Tensor:
        """Return the gradient of ``qkv_TCD`` from that of the output, and what :meth:`attend` gave."""
        return attend_backward(dout_THD, out_THD, qkv_TCD, heads, layout)


def inverse_rms(x_TE: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return 1 / rms(x) over the last dimension, (T, 1), in float32."""
    norm_T1 = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True, dtype=torch.float32)
    return norm_T1.square_().div_(x_TE.shape[-1]).add_(epsilon).rsqrt_()


def _most(x_TI: torch.Tensor) -> torch.Tensor:
    """Return the greatest magnitude of each row, (T, 1)."""
    return x_TI.abs().amax(1, keepdim=True).clamp_(min=LEAST)


def _broken(x_TI: torch.Tensor) -> torch.Tensor:
    """Return NaN for each row with a number that is not finite, else 0."""
    return (x_TI * 0).sum(1)


def _bytes_of(codes_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int16 as 256 times the first int8 and the second."""
    high_TI = (codes_TI + 128) >> 8
    return high_TI.to(torch.int8), (codes_TI - (high_TI << 8)).to(torch.int8)


def _down(adapters: Sequence[Adapter], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([one.down_RI for one in adapters]).to(dtype)


def _up(adapters: Sequence[Adapter], outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Return s B of all adapters, (O, R): each has its own rows and columns, and zeros are elsewhere."""
    up_OR = adapters[0].up_OR.new_zeros(outputs, adapters[-1].ranks.stop, dtype=dtype)
    for one in adapters:
        torch.mul(one.up_OR, one.scale, out=up_OR[one.outputs, one.ranks])
    return up_OR
