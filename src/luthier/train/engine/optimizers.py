"""Optimizers: which parameters learn how fast, and AdamW with its state in a quarter of the memory.

What comes in: a model whose trainable parameters require gradients. What goes out: parameter groups with a ``scale``
on the learning rate, and an optimizer over them whose state is tensors alone.

Names end in their dimensions: N values, B blocks of 256 values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

OptimizerName = Literal["adamw", "adamw_8bit"]
BLOCK = 256  # values that share a scale
SMALL = 4096  # tensors with fewer values keep their moments in float32
CHUNK = 1 << 18  # values that are updated at once: their float32 copies stay in the processor's cache
GPU_CHUNK = 1 << 24  # on a GPU, enough to outlast the start of the kernels; some 400 MB of copies
FUSED_DEVICES = {"cpu", "cuda"}
DECADES = 7  # powers of ten that the 8-bit code covers
KEYS = 1 << 16  # sign, exponent and first 7 bits of the fraction of a float32
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


def make_optimizer(name: OptimizerName, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return an optimizer over the groups of :func:`parameter_groups`."""
    if name == "adamw_8bit":
        return AdamW8bit(groups)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    # Fused, it passes over memory once instead of ten times.
    return torch.optim.AdamW(groups, fused=True if devices <= FUSED_DEVICES else None)


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of equal learning rate and weight decay, each parameter in one.

    A group's ``scale`` is its factor on the learning rate, ``layer_decay ** (layers + 1 - depth)``: depth 0 for
    embeddings, 1 to ``layers`` for the numbered layers, and factor 1 for all that comes behind them (Clark et al. 2020,
    ELECTRA, arXiv 2003.10555; Bao et al. 2021, BEiT, arXiv 2106.08254). A head that is tied to the embeddings counts as
    embeddings. Embeddings and whatever has fewer than two dimensions (biases, norms) get no weight decay.
    """
    embeddings = _embeddings(model)
    layers = 1 + max((_layer(name) for name, _ in model.named_parameters()), default=-1)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        embedding = id(parameter) in embeddings
        scale = layer_decay ** (layers + 1 - _depth(name, layers, embedding))
        decay = 0.0 if parameter.ndim < 2 or embedding else weight_decay
        fresh = {"params": [], "lr": learning_rate * scale, "weight_decay": decay, "scale": scale}
        groups.setdefault((scale, decay), fresh)["params"].append(parameter)
    return list(groups.values())


def _embeddings(model: torch.nn.Module) -> set[int]:
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    return {id(parameter) for table in tables for parameter in table.parameters(recurse=False)}


def _layer(name: str) -> int:
    """Return the number of the layer that a parameter belongs to, from 0; -1 where its name has none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def _depth(name: str, layers: int, embedding: bool) -> int:
    layer = _layer(name)
    if layer >= 0:
        return layer + 1
    # By name too: an encoder's embeddings have a norm and projections of their own.
    return 0 if embedding or "embed" in name else layers + 1


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with both moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), about 2.03 bytes a parameter.

    The moments are held blockwise with a dynamic tree code, signed for the first and unsigned for the second; the
    update is that of ``torch.optim.AdamW`` (Loshchilov and Hutter 2017, arXiv 1711.05101), computed in float32. Tensors
    of fewer than 4,096 values keep float32 moments.

    Other than in the paper, the code of the second moment is of its square root and never zero. Both moments then
    cover the same range of magnitudes; with the square itself, gradients below a 2,500th of their block's greatest got
    a second moment of zero beside a first one that is not, and so an update far too large.

    The state of a parameter is tensors alone: ``step``; ``exp_avg`` and ``exp_avg_sq``, uint8 (B, 256), or float32 in
    the shape of a small parameter; and of large ones ``exp_avg_absmax`` and ``exp_avg_sq_absmax``, float32 (B,).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of ``closure`` where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, in its own number types (torch would cast the codes to floats)."""
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            for key, value in state_dict["state"].get(place, {}).items():
                device = value.device if key == "step" else parameter.device
                self.state[parameter][key] = value.to(device, copy=True)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_fresh_state(parameter))
        state["step"] += 1
        if "exp_avg_absmax" in state:
            _update_blocks(parameter, gradient, state, group)
            return
        values = parameter.float()  # the parameter itself where it is float32
        _adamw(values, gradient.float(), state["exp_avg"], state["exp_avg_sq"], int(state["step"]), group)
        parameter.copy_(values)


def _fresh_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    step = torch.tensor(0.0)
    if parameter.numel() < SMALL or not parameter.is_contiguous():
        zeros = torch.zeros_like(parameter, dtype=torch.float32)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    blocks = math.ceil(parameter.numel() / BLOCK)
    codes = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=parameter.device)
    absmax_B = torch.zeros(blocks, device=parameter.device)
    return {
        "step": step,
        "exp_avg": codes,
        "exp_avg_absmax": absmax_B,
        "exp_avg_sq": codes.clone(),
        "exp_avg_sq_absmax": absmax_B.clone(),
    }


def _update_blocks(
    parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]
) -> None:
    """Update a parameter chunk by chunk: moments from their codes to float32, the step, and back."""
    signed, unsigned = _code(True, parameter.device), _code(False, parameter.device)
    step = int(state["step"])
    size = GPU_CHUNK if parameter.device.type == "cuda" else CHUNK
    chunks = zip(
        parameter.view(-1).split(size),
        gradient.reshape(-1).split(size),
        *(state[key].split(size // BLOCK) for key in ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")),
        strict=True,
    )
    for stored_N, gradient_N, codes, absmax_B, root_codes, root_absmax_B in chunks:
        values_N = stored_N.float()
        exp_avg_N = signed.decode(codes, absmax_B)[: values_N.numel()]
        exp_avg_sq_N = unsigned.decode(root_codes, root_absmax_B)[: values_N.numel()].square_()
        _adamw(values_N, gradient_N.float(), exp_avg_N, exp_avg_sq_N, step, group)
        stored_N.copy_(values_N)
        signed.encode(exp_avg_N, codes, absmax_B)
        unsigned.encode(exp_avg_sq_N.sqrt_(), root_codes, root_absmax_B)


def _adamw(
    values: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    group: dict[str, Any],
) -> None:
    """Do one step of AdamW (arXiv 1711.05101, algorithm 2) in place; all tensors float32 and of one shape."""
    beta1, beta2 = group["betas"]
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    divisor = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    values.addcdiv_(exp_avg, divisor, value=-group["lr"] / (1 - beta1**step))


@dataclass(frozen=True)
class _Code:
    """A dynamic tree code: 256 values in [-1, 1] in rising order, and how to find the nearest one with one look-up.

    ``nearest`` has for the upper 16 bits of a float32 the code nearest to the middle of all numbers that begin with
    them. So a value's code is at most 2^-7 of the value further from it than the nearest one; to find that one always
    takes a second look-up and three times as long.
    """

    values: torch.Tensor
    nearest: torch.Tensor

    def decode(self, codes_BK: torch.Tensor, absmax_B: torch.Tensor) -> torch.Tensor:
        """Return the values of codes (B, 256) with their scales, float32 (B * 256,)."""
        values_N = self.values.index_select(0, codes_BK.view(-1).int())
        return values_N.view(-1, BLOCK).mul_(absmax_B[:, None]).view(-1)

    def encode(self, values_N: torch.Tensor, codes_BK: torch.Tensor, absmax_B: torch.Tensor) -> None:
        """Write the codes (B, 256) and the scales (B,) of values (N,) float32; the last block is filled up."""
        rows_BK = torch.nn.functional.pad(values_N, (0, codes_BK.numel() - values_N.numel())).view(-1, BLOCK)
        absmax_B.copy_(rows_BK.abs().amax(1))
        scaled_BK = rows_BK / absmax_B.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        keys_N = (scaled_BK.view(-1).view(torch.int32) >> 16).bitwise_and_(KEYS - 1)
        codes_BK.view(-1).copy_(self.nearest.index_select(0, keys_N))


@cache
def _code(signed: bool, device: torch.device) -> _Code:
    with torch.inference_mode(False):
        values = torch.tensor(dynamic_tree_code(signed), dtype=torch.float64)
        nearest = torch.bucketize(_middle_of_keys(), (values[1:] + values[:-1]) / 2)
        lowest = 0 if signed else 1  # the square root of a second moment is never taken for zero
        return _Code(values.float().to(device), nearest.clamp(min=lowest).to(device, torch.uint8))


def dynamic_tree_code(signed: bool) -> list[float]:
    """Return the 256 values of the 8-bit dynamic tree code in rising order (arXiv 2110.02861, section 1.3).

    The number of leading zeros is the power of ten, the bits behind the first one are a linear fraction between 0.1
    and 1: every lower decade has half as many values. Zero and one are exact. Signed: a bit goes to the sign.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2 ** (decade if signed else decade + 1)
        for place in range(count):
            value = 10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * (place + 0.5) / count)
            values += [value, -value] if signed else [value]
    return sorted(values)


def _middle_of_keys() -> torch.Tensor:
    """Return for each upper half of a float32 the middle of the numbers that begin with it, float64 (65,536,)."""
    bits = (torch.arange(KEYS, dtype=torch.int64) << 16) + (1 << 15)
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32).double()
