"""The operations of a decoder layer in one pass each, by ``kernels.c``: torch's calls read and write all numbers each.

What the kernels are not made for (a GPU, widths that are no multiples of 16, numbers that do not lie side by side)
falls back to torch, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import CDLL, Array, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch

from luthier.llm.engine.kernels import find_kernels
from luthier.llm.engine.layer_operations import Adapter, IntegerSums, LayerOperations, Rope
from luthier.llm.engine.row_attention import Heads
from luthier.llm.engine.row_layout import RowLayout

LANES = 16  # as in kernels.c
# What each kernel takes, before the number of threads: pointers, arrays, whole numbers of 64 bits, floats.
TAKES = {
    "rms_norm": "pppnnf",
    "rms_norm_backward": "pppppnnf",
    "gated": "ppnn",
    "gated_backward": "pppnn",
    "rotate": "pppnnnnf",
    "attend": "ppppnnnnnf",
    "attend_backward": "pppppppnnnnnnf",
    "to_int8": "pppppnn",
    "to_int16": "pppnn",
    "multiply_int16": "pppnnn",
    "from_integers": "ppppnnn",
    "adapt": "pppaaannnnfpp",
    "adapt_backward": "pppaaannnnfpp",
    "adapter_gradients": "ppppppannnnf",
    "log_softmax": "ppppnnn",
}
KINDS: dict[str, Callable[[Any], Any]] = {
    "p": lambda tensor: c_void_p(None if tensor is None else tensor.data_ptr()),
    "a": lambda array: array,
    "n": c_int64,
    "f": c_float,
}


def operations_for(dtype: torch.dtype, device: torch.device) -> LayerOperations:
    """Return the fastest way to compute with such numbers there."""
    kernels = find_kernels(dtype) if device.type == "cpu" else None
    return LayerOperations() if kernels is None else NativeOperations(kernels, dtype)


class NativeOperations(LayerOperations):
    """The operations by compiled kernels for numbers of one type."""

    def __init__(self, kernels: CDLL, dtype: torch.dtype) -> None:
        self._kernels = kernels
        self._dtype = dtype

    def norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See :meth:`LayerOperations.norm`."""
        if not self._take(x_TE):
            return super().norm(x_TE, weight_E, epsilon)
        y_TE, weight_E = torch.empty_like(x_TE), weight_E.to(self._dtype)
        self._run("rms_norm", y_TE, x_TE, weight_E, *_rows(x_TE), epsilon)
        return y_TE

    def norm_backward(
        self,
        dy_TE: torch.Tensor,
        x_TE: torch.Tensor,
        weight_E: torch.Tensor,
        epsilon: float,
        onto_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`LayerOperations.norm_backward`."""
        if onto_TE is None or not self._take(dy_TE, x_TE, onto_TE):
            return super().norm_backward(dy_TE, x_TE, weight_E, epsilon, onto_TE)
        dx_TE, weight_E = torch.empty_like(x_TE), weight_E.to(self._dtype)
        self._run("rms_norm_backward", dx_TE, dy_TE, x_TE, weight_E, onto_TE, *_rows(x_TE), epsilon)
        return dx_TE

    def gated(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """See :meth:`LayerOperations.gated`."""
        tokens, half = len(gate_up_T2F), gate_up_T2F.shape[-1] // 2
        if half % LANES or not self._take(gate_up_T2F):
            return super().gated(gate_up_T2F)
        y_TF = gate_up_T2F.new_empty(tokens, half)
        self._run("gated", y_TF, gate_up_T2F, tokens, half)
        return y_TF

    def gated_backward(self, dy_TF: torch.Tensor, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """See :meth:`LayerOperations.gated_backward`."""
        if not self._take(dy_TF, gate_up_T2F):
            return super().gated_backward(dy_TF, gate_up_T2F)
        dgate_up_T2F = torch.empty_like(gate_up_T2F)
        self._run("gated_backward", dgate_up_T2F, dy_TF, gate_up_T2F, *dy_TF.shape)
        return dgate_up_T2F

    def rotate(self, heads_TXD: torch.Tensor, rope: Rope, *, back: bool = False) -> None:
        """See :meth:`LayerOperations.rotate`."""
        tokens, count, width = heads_TXD.shape
        together = heads_TXD.stride()[1:] == (width, 1) and heads_TXD.dtype == self._dtype
        if width % (2 * LANES) or not together:
            super().rotate(heads_TXD, rope, back=back)
            return
        sign = -1.0 if back else 1.0
        self._run("rotate", heads_TXD, *rope, tokens, count, heads_TXD.stride(0), width, sign)

    def adapt(
        self, x_TI: torch.Tensor, adapters: Sequence[Adapter], outputs: int, base: IntegerSums | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`LayerOperations.adapt`."""
        if not self._take(x_TI) or not _are_alike(adapters, outputs) or not self._convert(base):
            return super().adapt(x_TI, adapters, outputs, base)
        y_TO = base.sums_TW.view(self._dtype) if base else x_TI.new_empty(len(x_TI), outputs)
        low_TR = x_TI.new_empty(len(x_TI), adapters[-1].ranks.stop)
        sizes = (*_sizes(adapters, x_TI), adapters[0].scale)
        self._run("adapt", y_TO, low_TR, x_TI, *_weights(adapters), *sizes, *_meaning(base))
        return y_TO, low_TR

    def adapt_backward(
        self, dy_TO: torch.Tensor, adapters: Sequence[Adapter], base: IntegerSums | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`LayerOperations.adapt_backward`."""
        if not self._take(dy_TO) or not _are_alike(adapters, dy_TO.shape[-1]) or not self._convert(base):
            return super().adapt_backward(dy_TO, adapters, base)
        inputs = adapters[0].down_RI.shape[-1]
        dx_TI = base.sums_TW.view(self._dtype) if base else dy_TO.new_empty(len(dy_TO), inputs)
        dlow_TR = dy_TO.new_empty(len(dy_TO), adapters[-1].ranks.stop)
        sizes = (*_sizes(adapters, dx_TI), adapters[0].scale)
        self._run("adapt_backward", dx_TI, dlow_TR, dy_TO, *_weights(adapters), *sizes, *_meaning(base))
        return dx_TI, dlow_TR

    def adapter_gradients(
        self,
        dy_TO: torch.Tensor,
        x_TI: torch.Tensor,
        low_TR: torch.Tensor,
        dlow_TR: torch.Tensor,
        adapters: Sequence[Adapter],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See :meth:`LayerOperations.adapter_gradients`."""
        outputs = dy_TO.shape[-1]
        if not self._take(dy_TO, x_TI, low_TR, dlow_TR) or not _are_alike(adapters, outputs):
            return super().adapter_gradients(dy_TO, x_TI, low_TR, dlow_TR, adapters)
        ranks, inputs = low_TR.shape[-1], x_TI.shape[-1]
        ddown_RI, dup_OR = torch.empty(ranks, inputs), torch.empty(outputs, ranks // len(adapters))
        given = (ddown_RI, dup_OR, dy_TO, x_TI, low_TR, dlow_TR, *_sizes(adapters, x_TI), adapters[0].scale)
        self._run("adapter_gradients", *given)
        return [(ddown_RI[one.ranks], dup_OR[one.outputs]) for one in adapters]

    def to_int8(
        self, x_TI: torch.Tensor, times_I: torch.Tensor | None = None, fine_TI: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`LayerOperations.to_int8`."""
        if not self._take(x_TI):
            return super().to_int8(x_TI, times_I, fine_TI)
        codes_TI, scales_T = x_TI.new_empty(x_TI.shape, dtype=torch.int8), torch.empty(len(x_TI))
        self._run("to_int8", codes_TI, fine_TI, scales_T, x_TI, times_I, *x_TI.shape)
        return codes_TI, scales_T

    def to_int16(self, x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`LayerOperations.to_int16`."""
        if not self._take(x_TI):
            return super().to_int16(x_TI)
        codes_TI, scales_T = x_TI.new_empty(x_TI.shape, dtype=torch.int16), torch.empty(len(x_TI))
        self._run("to_int16", codes_TI, scales_T, x_TI, *x_TI.shape)
        return codes_TI, scales_T

    def multiply_int16(self, sums_TO: torch.Tensor, codes_TI: torch.Tensor, weight_OI: torch.Tensor) -> None:
        """See :meth:`LayerOperations.multiply_int16`."""
        given = (sums_TO, codes_TI, weight_OI)
        if codes_TI.shape[1] % 2 or not all(one.is_contiguous() for one in given):
            super().multiply_int16(sums_TO, codes_TI, weight_OI)
            return
        self._run("multiply_int16", *given, *codes_TI.shape, len(weight_OI))

    def from_integers(self, y_TW: torch.Tensor, of: IntegerSums, *, add: bool = False) -> None:
        """See :meth:`LayerOperations.from_integers`."""
        if not self._take(y_TW):
            super().from_integers(y_TW, of, add=add)
            return
        self._run("from_integers", y_TW, of.sums_TW, of.scales_T, of.times_W, *y_TW.shape, int(add))

    def attend(
        self, qkv_TCD: torch.Tensor, heads: Heads, layout: RowLayout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`LayerOperations.attend`."""
        if not self._take(qkv_TCD):
            return super().attend(qkv_TCD, heads, layout)
        out_THD = torch.empty_like(qkv_TCD[:, : heads.query])
        log_sums_TH = torch.empty(out_THD.shape[:2])
        spans = layout.spans_N4
        sizes = (len(spans), layout.longest_seen, heads.query, heads.key, qkv_TCD.shape[-1], heads.scale)
        self._run("attend", out_THD, log_sums_TH, qkv_TCD, spans, *sizes)
        return out_THD, log_sums_TH

    def attend_backward(
        self,
        dout_THD: torch.Tensor,
        out_THD: torch.Tensor,
        log_sums_TH: torch.Tensor | None,
        qkv_TCD: torch.Tensor,
        heads: Heads,
        layout: RowLayout,
    ) -> torch.Tensor:
        """See :meth:`LayerOperations.attend_backward`."""
        if log_sums_TH is None or not self._take(dout_THD, out_THD, qkv_TCD):
            return super().attend_backward(dout_THD, out_THD, log_sums_TH, qkv_TCD, heads, layout)
        tokens, _, width = qkv_TCD.shape
        dqkv_TCD, spans = torch.empty_like(qkv_TCD), layout.spans_N4
        sums = torch.zeros(torch.get_num_threads(), tokens, 2 * heads.key, width)
        sizes = (len(spans), layout.longest_seen, tokens, heads.query, heads.key, width, heads.scale)
        self._run("attend_backward", dqkv_TCD, sums, dout_THD, out_THD, log_sums_TH, qkv_TCD, spans, *sizes)
        return dqkv_TCD

    def log_softmax(
        self, logits_BV: torch.Tensor, targets_B: torch.Tensor, *, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :func:`log_softmax_in_place`."""
        if not self._take(logits_BV):
            return None
        logprobs_B, targets_B = torch.empty(len(logits_BV)), targets_B.contiguous()
        chosen_B = torch.empty_like(targets_B)
        self._run("log_softmax", logprobs_B, chosen_B, logits_BV, targets_B, *logits_BV.shape, int(gradient))
        return logprobs_B, chosen_B

    def _convert(self, base: IntegerSums | None) -> bool:
        """Return whether kernels make numbers of such sums, in their memory."""
        return base is None or self._dtype == torch.float32

    def _take(self, *values: torch.Tensor) -> bool:
        return all(v.dtype == self._dtype and v.is_contiguous() and v.shape[-1] % LANES == 0 for v in values)

    def _run(self, name: str, *arguments: torch.Tensor | Array[Any] | float | None) -> None:
        """Call a kernel, which gets the memory of tensors (None: none); other threads of Python go on meanwhile."""
        given = [KINDS[kind](argument) for kind, argument in zip(TAKES[name], arguments, strict=True)]
        if getattr(self._kernels, name)(*given, c_int(torch.get_num_threads())):
            raise MemoryError(f"no memory for {name}")


def log_softmax_in_place(
    logits_BV: torch.Tensor, targets_B: torch.Tensor, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the log-probabilities of targets, in float32, and the tokens with the largest logits.

    With ``gradient`` the logits become the gradient of each log-probability, onehot(target) - softmax. None (and
    nothing is changed) where no kernel takes such logits.
    """
    found = operations_for(logits_BV.dtype, logits_BV.device)
    if not isinstance(found, NativeOperations):
        return None
    return found.log_softmax(logits_BV, targets_B, gradient=gradient)


def _are_alike(adapters: Sequence[Adapter], outputs: int) -> bool:
    """Return whether each of the layers has an adapter, of the same rank and scale, as the kernels take them."""
    rank, scale = adapters[0].up_OR.shape[-1], adapters[0].scale
    starts = [0, *(one.outputs.stop for one in adapters)]
    return (
        rank % LANES == 0
        and starts[-1] == outputs
        and all(
            one.outputs.start == start
            and one.outputs.stop % LANES == 0
            and one.up_OR.shape[-1] == rank
            and one.scale == scale
            and all(w.dtype == torch.float32 and w.is_contiguous() for w in (one.down_RI, one.up_OR))
            for start, one in zip(starts, adapters, strict=False)
        )
    )


def _meaning(base: IntegerSums | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (base.scales_T, base.times_W) if base else (None, None)


def _weights(adapters: Sequence[Adapter]) -> tuple[Array[Any], Array[Any]]:
    pointers = c_void_p * len(adapters)
    return pointers(*(one.down_RI.data_ptr() for one in adapters)), pointers(
        *(one.up_OR.data_ptr() for one in adapters)
    )


def _sizes(adapters: Sequence[Adapter], x_TI: torch.Tensor) -> tuple[Array[Any], int, int, int, int]:
    """Return where each layer's outputs end, the number of layers, their rank, the tokens and the inputs."""
    ends = (c_int64 * len(adapters))(*(one.outputs.stop for one in adapters))
    return ends, len(adapters), adapters[0].up_OR.shape[-1], *x_TI.shape


def _rows(x_TE: torch.Tensor) -> tuple[int, int]:
    """Return how many rows numbers have that lie side by side, in however many dimensions, and how wide one is."""
    return x_TE.numel() // x_TE.shape[-1], x_TE.shape[-1]
