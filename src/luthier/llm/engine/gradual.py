"""Loads a base one tensor after the other, each in the numbers that it is held in: memory never holds more than that.

A model is made without weights first (its parameters have sizes alone), then filled from its files. That needs files
whose tensors have the names of the parameters, as those of decoders have; others are loaded whole by transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights

from luthier.llm.base_bits import Bits
from luthier.llm.engine.held_linear import HeldLinear, holdable
from luthier.llm.engine.held_weight import HeldWeight, WholeWeight
from luthier.llm.engine.integers import IntegerWeight
from luthier.llm.engine.quantised import quantise
from luthier.llm.engine.weight_files import WeightFiles


@dataclass(frozen=True)
class Holding:
    """The numbers that a base is held in: ``dtype``; what is trained in float32.

    With ``bits`` the linear layers of its blocks are stored in so many; with ``rounded`` they are held in ``dtype`` all
    the same, as the numbers that those bits stand for. With ``integers`` they are held, and multiplied, as integers.
    """

    dtype: torch.dtype
    bits: Bits | None = None
    rounded: bool = False
    integers: bool = False

    @property
    def is_in_few_bits(self) -> bool:
        """Whether linear layers are held or rounded."""
        return self.bits is not None or self.integers

    def held(self, weight_OI: torch.Tensor) -> HeldWeight:
        """Return the weight of a linear layer as it is held."""
        held: HeldWeight = WholeWeight(weight_OI)
        if self.bits:
            held = quantise(weight_OI, self.bits)
        if self.integers:
            return IntegerWeight.of(held.whole(torch.float32))
        return WholeWeight(held.whole(self.dtype)) if self.rounded else held


def outline(kind: Any, config: Any, **options: Any) -> Any:
    """Return a model whose parameters have sizes but no numbers; its buffers are real. ``kind`` is an Auto class."""
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, **options)
    return model.eval()


def own_names(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return a model's parameters by name, without those that are tied to another one."""
    tied = model.all_tied_weights_keys
    return {name: parameter for name, parameter in model.named_parameters() if name not in tied}


def is_explained(model: Any, files: WeightFiles, given: frozenset[str] = frozenset()) -> bool:
    """Return whether each of a model's own tensors stands under its name in the files, or in ``given``."""
    buffers = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return all(name in files or name in given for name in [*own_names(model), *buffers])


def fill(model: Any, files: WeightFiles, holding: Holding, device: torch.device) -> None:
    """Give an outline its numbers, on a device. What the files lack starts as transformers starts it."""
    for name in list(holdable(model)) if holding.is_in_few_bits else ():
        _hold_linear(model, name, files.read(f"{name}.weight").to(device), holding)
    for name, parameter in own_names(model).items():
        if not parameter.is_meta:
            continue
        dtype = torch.float32 if parameter.requires_grad else holding.dtype
        if name in files:
            _set(model, name, files.read(name).to(device, dtype, copy=True))
        else:
            _start(model, name, device, dtype)
    for name, buffer in model.named_buffers():
        if name in files:
            buffer.copy_(files.read(name))
    for module in model.modules():
        module._buffers.update({name: buffer.to(device) for name, buffer in module.named_buffers(recurse=False)})
    model.tie_weights()


def hold(model: Any, holding: Holding) -> None:
    """Round a model that was loaded whole to the numbers that it is to be held in, layer by layer."""
    for name in list(holdable(model)) if holding.is_in_few_bits else ():
        _hold_linear(model, name, model.get_submodule(name).weight.detach(), holding)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else holding.dtype)


def _hold_linear(model: Any, name: str, weight_OI: torch.Tensor, holding: Holding) -> None:
    """Give a linear layer its weight as it is held."""
    held, linear = holding.held(weight_OI), model.get_submodule(name)
    if isinstance(held, WholeWeight):
        _set(model, f"{name}.weight", held.weight_OI)
        return
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, HeldLinear(held, holding.dtype, linear.bias).eval())


def _set(model: Any, name: str, value: torch.Tensor) -> None:
    owner, _, child = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, child, torch.nn.Parameter(value, requires_grad=getattr(module, child).requires_grad))


def _start(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
    _set(model, name, torch.empty(model.get_parameter(name).shape))
    with torch.no_grad():
        model._init_weights(model.get_submodule(name.rpartition(".")[0]))
    _set(model, name, model.get_parameter(name).data.to(device, dtype))
