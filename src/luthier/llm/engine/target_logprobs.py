"""Log-probabilities of target tokens without holding the logits.

The vocabulary is multiplied with the hidden states of targets alone, a piece at a time. A log-probability depends on
its own hidden state alone, so its gradient there, W[target] - softmax(logits) W, is made together with it, while the
logits are still at hand; the backward pass then only scales it. Every objective over tokens starts from here.

Names end in their dimensions: M targets, B targets of a piece, V vocabulary, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

PIECE_LOGITS = 8_000_000  # numbers that are held at once


@dataclass(frozen=True)
class Targets:
    """What a model says of its targets: natural log-probabilities (with gradient), and the tokens it would choose."""

    logprobs_M: torch.Tensor
    chosen_M: torch.Tensor


def target_logprobs(
    hidden_ME: torch.Tensor, head: torch.nn.Linear, targets_M: torch.Tensor, label_smoothing: float = 0.0
) -> Targets:
    """Return log softmax(W h)[target] of each hidden state, in float32.

    With ``label_smoothing`` e it is (1 - e) log p[target] + e mean over the vocabulary of log p (Szegedy et al. 2016,
    arXiv 1512.00567, section 7). The head may be trained; then its logits are made again in the backward pass.
    """
    if head.bias is not None or (head.weight.requires_grad and torch.is_grad_enabled()):
        return _through_autograd(hidden_ME, head, targets_M, label_smoothing)
    logprobs_M, chosen_M = _TargetLogprobs.apply(hidden_ME, head.weight.to(hidden_ME.dtype), targets_M, label_smoothing)
    return Targets(logprobs_M, chosen_M)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ME: torch.Tensor, weight_VE: torch.Tensor, targets_M: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[0]
        logprobs_M = torch.empty(len(targets_M), device=hidden_ME.device)
        chosen_M = torch.empty_like(targets_M)
        gradient_ME = torch.empty_like(hidden_ME) if wanted else None
        for piece in _pieces(len(targets_M), len(weight_VE)):
            logits_BV = (hidden_ME[piece] @ weight_VE.T).float()
            picked_B1 = targets_M[piece, None]
            chosen_M[piece] = logits_BV.argmax(dim=-1)
            log_sum_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
            mean_B1 = logits_BV.mean(dim=-1, keepdim=True) if smoothing else 0.0
            mixed_B1 = (1 - smoothing) * logits_BV.gather(1, picked_B1) + smoothing * mean_B1
            logprobs_M[piece] = (mixed_B1 - log_sum_B1)[:, 0]
            if gradient_ME is not None:
                weights_BV = logits_BV.sub_(log_sum_B1).exp_().neg_()
                weights_BV += smoothing / len(weight_VE)
                weights_BV.scatter_add_(1, picked_B1, torch.full_like(picked_B1, 1 - smoothing, dtype=torch.float32))
                gradient_ME[piece] = weights_BV.to(weight_VE.dtype) @ weight_VE
        if gradient_ME is not None:
            ctx.save_for_backward(gradient_ME)
        ctx.mark_non_differentiable(chosen_M)
        return logprobs_M, chosen_M

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_ME,) = ctx.saved_tensors
        return gradient_ME * gradients[0][:, None].to(gradient_ME.dtype), None, None, None


def _through_autograd(
    hidden_ME: torch.Tensor, head: torch.nn.Linear, targets_M: torch.Tensor, smoothing: float
) -> Targets:
    logprobs: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []

    def piece_logprobs(hidden_BE: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BV = torch.nn.functional.linear(hidden_BE, head.weight.to(hidden_BE.dtype), head.bias).float()
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        picked_B = logprobs_BV.gather(1, targets_B[:, None])[:, 0]
        return (1 - smoothing) * picked_B + smoothing * logprobs_BV.mean(-1), logits_BV.detach().argmax(dim=-1)

    for piece in _pieces(len(targets_M), head.out_features):
        found = checkpoint(piece_logprobs, hidden_ME[piece], targets_M[piece], use_reentrant=False)
        logprobs.append(found[0])
        chosen.append(found[1])
    return Targets(torch.cat(logprobs), torch.cat(chosen))


def _pieces(targets: int, vocabulary: int) -> list[slice]:
    size = max(1, PIECE_LOGITS // vocabulary)
    return [slice(first, first + size) for first in range(0, targets, size)]
