"""Linear layers that read the same input as one product: q, k and v; gate and up; with their low-rank adapters.

A projection lays the weights of its layers one below the other in one tensor (the layers' own parameters become views
of it, so everything else sees them as before) and knows its gradients by formula. For an adapter of rank R and scale s,
y = x W' + s (x A') B', hence dA = s (dy B)' x, dB = s dy' (x A'), dx = dy W + s (dy B) A (Hu et al. 2021, arXiv
2106.09685, equation 3).

Names end in their dimensions: T tokens, I inputs, O outputs of all layers, R rank (of all layers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from luthier.llm.engine.held_linear import HeldLinear
from luthier.llm.engine.held_weight import HeldWeight, StackedWeights, WholeWeight
from luthier.llm.engine.integers import IntegerWeight
from luthier.llm.engine.layer_operations import Adapter, LayerOperations


@dataclass(frozen=True)
class _Part:
    """One linear layer: its rows of the outputs, and its adapter where it has one."""

    linear: Any  # a torch.nn.Linear, held or not
    outputs: slice
    adapter: Adapter | None = None

    @property
    def is_learning(self) -> bool:
        """Whether its adapter is trained."""
        return self.adapter is not None and self.adapter.down_RI.requires_grad


class Projection:
    """Linear layers over one input. ``parameters`` are those that are trained, in the order of :meth:`gradients`."""

    def __init__(self, layers: Sequence[Any], operations: LayerOperations) -> None:
        self._do = operations
        self._parts = list(_parts(layers))
        self._weight = _fuse([part.linear for part in self._parts])
        self._adapters = [part.adapter for part in self._parts if part.adapter is not None]
        self._learns = any(part.is_learning for part in self._parts)
        self.parameters = [parameter for part in self._parts for parameter in _trained(part)]

    def forward(
        self, x_TI: torch.Tensor, onto_TO: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the outputs (T, O), added to ``onto`` where it is given, and x A' (T, R) for the backward pass."""
        low_TR = None
        if self._adapters:
            y_TO, low_TR = self._weight.adapted(x_TI, self._adapters, self._do)
            if onto_TO is not None:
                y_TO += onto_TO
        else:
            y_TO = self._weight.times(x_TI, None if onto_TO is None else onto_TO.clone())
        bias = self._bias(x_TI.dtype)
        if bias is not None:
            y_TO += bias
        return y_TO, low_TR

    def low(self, x_TI: torch.Tensor) -> torch.Tensor | None:
        """Return x A' (T, R) alone, None without adapters: of the outputs only the adapters' small part is made."""
        return self._do.adapt(x_TI, self._adapters, self._weight.shape[0])[1] if self._adapters else None

    def backward(
        self, dy_TO: torch.Tensor, *, input_needed: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of the input (None where it is not needed) and of x A' (T, R), None without adapters."""
        if input_needed and self._adapters:
            return self._weight.adapted_back(dy_TO, self._adapters, self._do)
        dlow_TR = self._do.adapt_backward(dy_TO, self._adapters)[1] if self._adapters else None
        return self._weight.times_back(dy_TO) if input_needed else None, dlow_TR

    def gradients(
        self, dy_TO: torch.Tensor, x_TI: torch.Tensor, low_TR: torch.Tensor | None, dlow_TR: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return the gradients of ``parameters``, from those of the outputs and of x A'."""
        learned: list[tuple[torch.Tensor, torch.Tensor]] = []
        if low_TR is not None and dlow_TR is not None and self._learns:
            learned = self._do.adapter_gradients(dy_TO, x_TI, low_TR, dlow_TR, self._adapters)
        of_adapters = iter(learned)
        found: list[torch.Tensor] = []
        for part in self._parts:
            found += _linear_gradients(part.linear, dy_TO[:, part.outputs], x_TI)
            if part.adapter is not None and self._learns:
                own = next(of_adapters)
                found += own if part.is_learning else ()
        return found

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        if self._parts[0].linear.bias is None:
            return None
        return torch.cat([part.linear.bias for part in self._parts]).to(dtype)


def can_project(layer: Any) -> bool:
    """Return whether a layer is one that :class:`Projection` knows the gradients of."""
    if not isinstance(layer, LoraLayer):
        return type(layer) in (torch.nn.Linear, HeldLinear)
    plain = type(layer.get_base_layer()) in (torch.nn.Linear, HeldLinear)
    dropouts = (dropout for dropout in layer.lora_dropout.values() if not isinstance(dropout, torch.nn.Identity))
    variants: dict[str, Any] = getattr(layer, "lora_variant", {})
    return plain and not variants and not any(dropouts) and len(layer.active_adapters) == 1


def _parts(layers: Sequence[Any]) -> Iterator[_Part]:
    row = rank = 0
    for layer in layers:
        linear = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        outputs = slice(row, row + linear.out_features)
        row = outputs.stop
        name = layer.active_adapters[0] if isinstance(layer, LoraLayer) else None
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            ranks = slice(rank, rank + len(down))
            rank = ranks.stop
            yield _Part(linear, outputs, Adapter(down, up, float(layer.scaling[name]), outputs, ranks))
        else:
            yield _Part(linear, outputs)


def _is_trained(linear: torch.nn.Linear) -> bool:
    # To ask a held layer for its weight would make it whole.
    return not isinstance(linear, HeldLinear) and linear.weight.requires_grad


def _trained(part: _Part) -> Iterator[torch.nn.Parameter]:
    if _is_trained(part.linear):
        yield part.linear.weight
    if part.linear.bias is not None and part.linear.bias.requires_grad:
        yield part.linear.bias
    if part.adapter is not None and part.is_learning:
        yield part.adapter.down_RI
        yield part.adapter.up_OR


def _linear_gradients(linear: Any, dy_TO: torch.Tensor, x_TI: torch.Tensor) -> Iterator[torch.Tensor]:
    if _is_trained(linear):
        yield (dy_TO.T @ x_TI).to(linear.weight.dtype)
    if linear.bias is not None and linear.bias.requires_grad:
        yield dy_TO.sum(0).to(linear.bias.dtype)


def _fuse(linears: Sequence[Any]) -> HeldWeight:
    """Return the weights of layers as one; what the layers hold becomes views of it where that can be."""
    ends = list(accumulate(linear.out_features for linear in linears))
    rows = [slice(end - linear.out_features, end) for end, linear in zip(ends, linears, strict=True)]
    held = [linear.held for linear in linears if isinstance(linear, HeldLinear)]
    if not held:
        if len(linears) == 1:
            return WholeWeight(linears[0].weight.data)
        fused_OI = torch.cat([linear.weight.data for linear in linears])
        for linear, own in zip(linears, rows, strict=True):
            linear.weight.data = fused_OI[own]
        return WholeWeight(fused_OI)
    integers = [weight for weight in held if isinstance(weight, IntegerWeight)]
    if len(integers) < len(linears):
        return StackedWeights(held)
    fused = IntegerWeight.stacked(integers)
    for linear, own in zip(linears, rows, strict=True):
        linear.held = fused.rows(own)
    return fused
