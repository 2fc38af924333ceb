"""Log-probabilities of target tokens without holding the logits.

The vocabulary is multiplied with the hidden states of targets alone, a piece at a time. Where the head is frozen, a
log-probability depends on its own hidden state alone, so its gradient there, W' (onehot(target) - softmax(logits)), is
made together with it, while the logits are still at hand; the backward pass then only scales it. A head that is trained
gets its gradient in the backward pass, from logits that are made again. Every objective over tokens starts from here.

Names end in their dimensions: M targets, B targets of a piece, V vocabulary, E model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from luthier.llm.engine.held_weight import HeldWeight, WholeWeight
from luthier.llm.engine.integers import IntegerWeight
from luthier.llm.engine.native_operations import log_softmax_in_place

PIECE_LOGITS = 8_000_000  # numbers that are held at once: as many as a processor's caches and memory take well
BYTES_EACH = 12  # of a logit, in float32, with what is made of it
GPU_SHARE = 64  # on a GPU, that share of its memory is for logits: a product of few targets would leave it idle
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: cap tanh(scale (W h + b) / cap), or scale (W h + b) without a cap.

    ``held`` is what a frozen head is multiplied by instead of its weight.
    """

    linear: torch.nn.Linear
    scale: float = 1.0
    cap: float = 0.0
    held: HeldWeight | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return a model's head, with what its family does to the logits behind it.

        Granite divides them, Cohere and Falcon-H1 multiply them, Gemma 2 and others cap them.
        """
        config = model.config
        factors = (getattr(model, "logit_scale", None), getattr(config, "lm_head_multiplier", None))
        scale = math.prod(factor or 1.0 for factor in factors) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = next((found for name in LOGIT_CAPS if (found := getattr(config, name, None))), 0.0)
        return cls(model.get_output_embeddings(), scale, cap)

    def in_integers(self) -> Head:
        """Return the head with its products in integers, unless it is trained or caps its logits.

        Its weight is held less the mean of its rows: that moves all logits of a token by as much, which changes no
        probability, and what is left out of a gradient, whose logits' parts add up to 0, is then far less.
        """
        weight_VE = self.linear.weight.detach()
        if self.linear.weight.requires_grad or self.cap:
            return self
        return replace(self, held=IntegerWeight.of(weight_VE, weight_VE.mean(0), fine=True))


@dataclass(frozen=True)
class Targets:
    """What a model says of its targets: natural log-probabilities (with gradient), and the tokens it would choose."""

    logprobs_M: torch.Tensor
    chosen_M: torch.Tensor


def target_logprobs(
    hidden_ME: torch.Tensor, head: Head, targets_M: torch.Tensor, label_smoothing: float = 0.0
) -> Targets:
    """Return log softmax(logits)[target] of each hidden state, in float32.

    With ``label_smoothing`` e it is (1 - e) log p[target] + e mean over the vocabulary of log p (Szegedy et al. 2016,
    arXiv 1512.00567, section 7). The head may be trained; then its logits are made again in the backward pass.
    """
    softmax = _Softmax(head.scale, head.cap, label_smoothing)
    weight_VE, bias_V = head.linear.weight, head.linear.bias
    if weight_VE.requires_grad and torch.is_grad_enabled():
        return Targets(*_TrainedHead.apply(hidden_ME, weight_VE, bias_V, targets_M, softmax))
    cast_VE, cast_V = _cast(weight_VE, bias_V, hidden_ME.dtype)
    return Targets(*_FrozenHead.apply(hidden_ME, head.held or WholeWeight(cast_VE), cast_V, targets_M, softmax))


@dataclass(frozen=True)
class _Softmax:
    """From hidden states to log-probabilities, and the way back."""

    scale: float
    cap: float
    smoothing: float

    def logits(self, hidden_BE: torch.Tensor, weight_VE: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        """Return the logits in float32."""
        return self.scaled(torch.nn.functional.linear(hidden_BE, weight_VE, bias_V))

    def outcome(
        self, logits_BV: torch.Tensor, targets_B: torch.Tensor, *, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return log-probabilities, chosen tokens and, where wanted, the gradient over W h + b, which is given.

        It may be overwritten.
        """
        if self.scale == 1.0 and not self.cap and not self.smoothing:
            done = log_softmax_in_place(logits_BV, targets_B, gradient=gradient)
            if done is not None:
                return *done, logits_BV if gradient else None
        logits_BV = self.scaled(logits_BV)
        picked_B1 = targets_B[:, None]
        chosen_B = logits_BV.argmax(dim=-1)
        logprobs_B1, log_sum_B1 = self.logprobs(logits_BV, picked_B1)
        dlogits_BV = self.gradient(logits_BV, log_sum_B1, picked_B1) if gradient else None
        return logprobs_B1[:, 0], chosen_B, dlogits_BV

    def scaled(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Return the logits in float32 from what the head makes."""
        logits_BV = logits_BV.float()
        if self.scale != 1.0:
            logits_BV *= self.scale
        return logits_BV.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits_BV

    def logprobs(self, logits_BV: torch.Tensor, picked_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of the picked tokens, and the logarithm of the sum of all exponentials."""
        log_sum_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
        mean_B1 = logits_BV.mean(dim=-1, keepdim=True) if self.smoothing else 0.0
        mixed_B1 = (1 - self.smoothing) * logits_BV.gather(1, picked_B1) + self.smoothing * mean_B1
        return mixed_B1 - log_sum_B1, log_sum_B1

    def gradient(self, logits_BV: torch.Tensor, log_sum_B1: torch.Tensor, picked_B1: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the log-probabilities over W h + b; the logits are overwritten."""
        slope_BV = self.scale * (1 - (logits_BV / self.cap).square_()) if self.cap else self.scale
        weights_BV = logits_BV.sub_(log_sum_B1).exp_().neg_()
        weights_BV += self.smoothing / weights_BV.shape[1]
        weights_BV.scatter_add_(1, picked_B1, torch.full_like(picked_B1, 1 - self.smoothing, dtype=torch.float32))
        return weights_BV if isinstance(slope_BV, float) and slope_BV == 1.0 else weights_BV.mul_(slope_BV)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ME: torch.Tensor,
        weight: HeldWeight,
        bias_V: torch.Tensor | None,
        targets_M: torch.Tensor,
        softmax: _Softmax,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_M = torch.empty(len(targets_M), device=hidden_ME.device)
        chosen_M = torch.empty_like(targets_M)
        gradient_ME = torch.empty_like(hidden_ME) if ctx.needs_input_grad[0] else None
        pieces = _pieces(targets_M, weight.shape[0])
        # One piece of memory for all pieces: to get new pages from the system costs as much as a product.
        held_BV = hidden_ME.new_empty(len(targets_M[pieces[0]]), weight.shape[0])
        for piece in pieces:
            logits_BV = held_BV[: len(targets_M[piece])]
            weight.times_into(logits_BV, hidden_ME[piece])
            if bias_V is not None:
                logits_BV += bias_V
            outcome = softmax.outcome(logits_BV, targets_M[piece], gradient=gradient_ME is not None)
            logprobs_M[piece], chosen_M[piece], dlogits_BV = outcome
            if gradient_ME is not None and dlogits_BV is not None:
                gradient_ME[piece] = weight.times_back(dlogits_BV.to(hidden_ME.dtype))
        if gradient_ME is not None:
            ctx.save_for_backward(gradient_ME)
        ctx.mark_non_differentiable(chosen_M)
        return logprobs_M, chosen_M

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient_ME,) = ctx.saved_tensors
        return gradient_ME * gradients[0][:, None].to(gradient_ME.dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ME: torch.Tensor,
        weight_VE: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_M: torch.Tensor,
        softmax: _Softmax,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cast_VE, cast_V = _cast(weight_VE, bias_V, hidden_ME.dtype)
        logprobs_M1 = torch.empty(len(targets_M), 1, device=hidden_ME.device)
        log_sum_M1, chosen_M = torch.empty_like(logprobs_M1), torch.empty_like(targets_M)
        for piece in _pieces(targets_M, len(weight_VE)):
            logits_BV = softmax.logits(hidden_ME[piece], cast_VE, cast_V)
            chosen_M[piece] = logits_BV.argmax(dim=-1)
            logprobs_M1[piece], log_sum_M1[piece] = softmax.logprobs(logits_BV, targets_M[piece, None])
        ctx.save_for_backward(hidden_ME, weight_VE, bias_V, targets_M, log_sum_M1)
        ctx.softmax = softmax
        ctx.mark_non_differentiable(chosen_M)
        return logprobs_M1[:, 0], chosen_M

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ME, weight_VE, bias_V, targets_M, log_sum_M1 = ctx.saved_tensors
        cast_VE, cast_V = _cast(weight_VE, bias_V, hidden_ME.dtype)
        dhidden_ME, dweight_VE = torch.empty_like(hidden_ME), torch.zeros_like(weight_VE)
        dbias_V = None if bias_V is None else torch.zeros_like(bias_V)
        for piece in _pieces(targets_M, len(weight_VE)):
            logits_BV = ctx.softmax.logits(hidden_ME[piece], cast_VE, cast_V)
            dlogits_BV = ctx.softmax.gradient(logits_BV, log_sum_M1[piece], targets_M[piece, None])
            dlogits_BV = dlogits_BV.mul_(gradients[0][piece, None]).to(cast_VE.dtype)
            dhidden_ME[piece] = dlogits_BV @ cast_VE
            dweight_VE += dlogits_BV.T @ hidden_ME[piece]
            if dbias_V is not None:
                dbias_V += dlogits_BV.sum(0)
        return dhidden_ME, dweight_VE, dbias_V, None, None


def _cast(
    weight_VE: torch.Tensor, bias_V: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a head's numbers as the products take them, without gradient."""
    return weight_VE.detach().to(dtype), None if bias_V is None else bias_V.detach().to(dtype)


def _pieces(targets_M: torch.Tensor, vocabulary: int) -> list[slice]:
    held = _logits_of_gpu(targets_M.device) if targets_M.is_cuda else PIECE_LOGITS
    size = max(1, held // vocabulary)
    return [slice(first, first + size) for first in range(0, len(targets_M), size)]


@cache
def _logits_of_gpu(device: torch.device) -> int:
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(PIECE_LOGITS, memory // GPU_SHARE // BYTES_EACH)
