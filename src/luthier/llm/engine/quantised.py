"""A frozen base in 4 or 8 bits, for adapters that are trained over it (QLoRA).

Dettmers et al. 2023, arXiv 2305.14314: weights are stored in 4-bit NormalFloat (NF4) with one scale per block of 64,
the scales themselves in 8 bits (double quantisation), and are made whole again just where they are multiplied. Or, for
less error, in int8 with one float32 scale per block. Pure torch, on any device.

What comes in: a weight in float32, bfloat16 or float16. What goes out: the same weight as it is held, which a
:class:`luthier.llm.engine.held_linear.HeldLinear` multiplies with.

Names end in their dimensions: N weights of a layer (O outputs x I inputs, row by row), B blocks of 64, G groups of 256
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from luthier.llm.base_bits import Bits
from luthier.llm.engine.held_weight import HeldWeight
from luthier.llm.engine.layer_operations import INT8_MAX

BLOCK = 64  # weights that share a scale
GROUP = 256  # scales that share the scale and offset of their 8 bits
PIECE = 64 * BLOCK * GROUP  # weights that are quantised at once: what that takes is bounded, whatever their number
UINT8_MAX = 255
# The 16 values of NF4 (Dettmers et al. 2023, appendix E): quantiles of a normal distribution scaled to [-1, 1], one of
# them exactly zero.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class QuantisedWeight(HeldWeight):
    """A weight matrix in 4 or 8 bits, which is made whole again wherever it is multiplied.

    ``codes``: 4 bits: uint8 (B * 32,), two NF4 codes a byte, the first in the high half; 8 bits: int8 (B * 64,). The
    last block is filled up with zeros. ``absmax_B``: the greatest magnitude of each block; 8 bits: float32; 4 bits:
    uint8 between the two float32 numbers of its group in ``absmax_range_G2``: the least, and the step.
    """

    bits: Bits
    size: tuple[int, int]
    codes: torch.Tensor
    absmax_B: torch.Tensor
    absmax_range_G2: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """See :attr:`HeldWeight.shape`."""
        return self.size

    @property
    def device(self) -> torch.device:
        """See :attr:`HeldWeight.device`."""
        return self.codes.device

    @property
    def bytes(self) -> int:
        """See :attr:`HeldWeight.bytes`."""
        tensors = (self.codes, self.absmax_B, self.absmax_range_G2)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def scales(self) -> torch.Tensor:
        """Return the greatest magnitude of each block, float32 (B,)."""
        return _whole_absmax(self.absmax_B, self.absmax_range_G2)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`HeldWeight.whole`."""
        if self.bits == 4:
            pairs = _nf4_pairs(self.codes.device).index_select(0, self.codes.int())
            weight_B64 = pairs.view(torch.float32).view(-1, BLOCK).mul_(self.scales()[:, None])
        else:
            weight_B64 = self.codes.view(-1, BLOCK) * (self.scales() / INT8_MAX)[:, None]
        outputs, inputs = self.size
        return weight_B64.view(-1)[: outputs * inputs].view(outputs, inputs).to(dtype)

    def to(self, device: torch.device) -> QuantisedWeight:
        """See :meth:`HeldWeight.to`."""
        spread = self.absmax_range_G2
        return QuantisedWeight(
            self.bits,
            self.size,
            self.codes.to(device),
            self.absmax_B.to(device),
            None if spread is None else spread.to(device),
        )


@torch.no_grad()
def quantise(weight_OI: torch.Tensor, bits: Bits) -> QuantisedWeight:
    """Return a weight matrix (O, I) in 4 bits (NF4, double quantisation) or 8 (int8), on its own device.

    Every value becomes the code whose product with the stored scale of its block is nearest (arXiv 2305.14314,
    sections 2 and 3); of two equally near, the lower. Blocks run on over the ends of rows, so no size is odd.
    """
    outputs, inputs = weight_OI.shape
    parts = [_quantised(part_N.float(), bits) for part_N in weight_OI.detach().reshape(-1).split(PIECE)]
    codes, absmax_B, ranges = (list(some) for some in zip(*parts, strict=True))
    range_G2 = torch.cat(ranges) if bits == 4 else None
    return QuantisedWeight(bits, (outputs, inputs), torch.cat(codes), torch.cat(absmax_B), range_G2)


def _quantised(flat_N: torch.Tensor, bits: Bits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes of whole groups of blocks (the last may be open), their scales, and the groups' ranges."""
    weight_B64 = torch.nn.functional.pad(flat_N, (0, -flat_N.numel() % BLOCK)).view(-1, BLOCK)
    absmax_B = weight_B64.abs().amax(1)
    if bits == 8:
        codes = (_divided(weight_B64, absmax_B) * INT8_MAX).round().to(torch.int8).view(-1)
        return codes, absmax_B, absmax_B.new_empty(0, 2)
    stored_B, range_G2 = _double_quantised(absmax_B)
    scaled_B64 = _divided(weight_B64, _whole_absmax(stored_B, range_G2))
    codebook = torch.tensor(NF4, device=flat_N.device)
    codes_N = torch.bucketize(scaled_B64, (codebook[1:] + codebook[:-1]) / 2, out_int32=True).view(-1).to(torch.uint8)
    return codes_N[0::2] << 4 | codes_N[1::2], stored_B, range_G2


def _divided(weight_B64: torch.Tensor, absmax_B: torch.Tensor) -> torch.Tensor:
    """Return the weights over the scale of their block, within [-1, 1]; blocks of zeros stay zero."""
    least = torch.finfo(torch.float32).tiny
    return (weight_B64 / absmax_B.clamp(min=least)[:, None]).clamp_(-1, 1)


def _double_quantised(absmax_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales in 8 bits: uint8 (B,) and per group of 256 the least and the step, float32 (G, 2).

    Arithmetic of arXiv 2305.14314, section 3, "double quantization", with 255 even steps between the least and the
    greatest scale of a group instead of an 8-bit float around the mean: the error is at most half a step.
    """
    blocks = absmax_B.numel()
    filled = torch.cat([absmax_B, absmax_B[-1:].expand(-blocks % GROUP)]).view(-1, GROUP)
    least_G, greatest_G = filled.aminmax(dim=1)
    step_G = (greatest_G - least_G) / UINT8_MAX
    steps = (filled - least_G[:, None]) / step_G.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    stored = steps.round().clamp_(0, UINT8_MAX).to(torch.uint8)
    return stored.view(-1)[:blocks].clone(), torch.stack([least_G, step_G], dim=1)


def _whole_absmax(absmax_B: torch.Tensor, absmax_range_G2: torch.Tensor | None) -> torch.Tensor:
    if absmax_range_G2 is None:
        return absmax_B
    range_B2 = absmax_range_G2.repeat_interleave(GROUP, dim=0)[: absmax_B.numel()]
    return torch.addcmul(range_B2[:, 0], absmax_B.float(), range_B2[:, 1])


@cache
def _nf4_pairs(device: torch.device) -> torch.Tensor:
    """Return the two float32 values of every byte as one int64 each (256,): one look-up gives two weights."""
    with torch.inference_mode(False):
        codebook = torch.tensor(NF4, dtype=torch.float32)
        pairs = torch.stack([codebook.repeat_interleave(16), codebook.repeat(16)], dim=1)
        return pairs.view(torch.int64).view(-1).to(device)
