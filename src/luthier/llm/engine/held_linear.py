"""Linear layers whose frozen weight is held in few numbers, by blocks of bits or as integers, for adapters over them.

PEFT takes them for linear layers. What is held is not in ``state_dict``: it is made again from the base's own files
whenever that is loaded. Merging into such a layer is not possible, since PEFT's ``merge`` would add to a weight made
for the moment: merge into the numbers that it stands for (:mod:`luthier.llm.engine.merging`).

Names end in their dimensions: O outputs, I inputs, T or X anything before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch.autograd.function import once_differentiable

from luthier.llm.engine.held_weight import HeldWeight

NEVER_HELD = ("lm_head", "score", "classifier")  # parts of a model


class HeldLinear(torch.nn.Linear):
    """A linear layer whose weight is held frozen. Gradients flow to its input (and its bias), never to its weight.

    ``held`` is that weight. ``weight_dtype`` is the number type in which ``weight`` is given; products are
    computed in that of the input, or of autocast where that is on.
    """

    def __init__(self, held: HeldWeight, weight_dtype: torch.dtype, bias: torch.nn.Parameter | None) -> None:
        torch.nn.Module.__init__(self)  # not Linear's: it would make a whole weight
        self.out_features, self.in_features = held.shape
        self.held = held
        self.weight_dtype = weight_dtype
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight (O, I) in ``weight_dtype``, made anew on every access: a change of it changes nothing."""
        return self.held.whole(self.weight_dtype)

    @property
    def qweight(self) -> torch.Tensor:
        """Where the weight is: PEFT asks this of layers in few bits, instead of the weight, for each adapter's part."""
        return torch.empty(0, device=self.held.device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the outputs (T, O) for inputs (T, I)."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output_TO: torch.Tensor = _Product.apply(input.to(dtype), self.held)
        return output_TO if self.bias is None else output_TO + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Say the sizes and the bits."""
        return f"{super().extra_repr()}, bits={8 * self.held.bytes / self.out_features / self.in_features:.1f}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow ``.to(device)`` and ``.to(dtype)``: codes and scales move, but keep their own number types."""
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self.weight_dtype, device=self.held.device))
        self.weight_dtype = moved.dtype
        self.held = self.held.to(moved.device)
        return self


class _Product(torch.autograd.Function):
    """Multiply with a held weight; what backward needs of it is made again instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x_XI: torch.Tensor, held: HeldWeight) -> torch.Tensor:
        ctx.held = held
        outputs, inputs = held.shape
        return held.times(x_XI.reshape(-1, inputs)).view(*x_XI.shape[:-1], outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XO: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        outputs, inputs = ctx.held.shape
        return ctx.held.times_back(dy_XO.reshape(-1, outputs)).view(*dy_XO.shape[:-1], inputs), None


def holdable(model: torch.nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers that can be held in few bits: those of a model's numbered layers.

    Left out are parts of heads, those outside a numbered list of layers (such as heads), subclasses of ``Linear``, and
    weights that two modules share (such as a head tied to embeddings).
    """
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for name, module in model.named_modules():
        parts = name.split(".")
        numbered = any(part.isdigit() for part in parts)
        if (
            type(module) is torch.nn.Linear
            and numbered
            and set(NEVER_HELD).isdisjoint(parts)
            and owners[id(module.weight)] == 1
        ):
            yield name
