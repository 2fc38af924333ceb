"""Rows through a model: hidden states once, logits only where there is a target.

Names end in their dimensions: M targets, V vocabulary, E model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from luthier.llm.engine.prefix_attention import RowLayout
from luthier.llm.rows import Row, pack, shared_prefix
from luthier.templates.renderer import TokenizedExample


def target_logits(model: Any, row: Row, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (M, V) in float32 and the tokens to predict (M,) of a row's targets.

    The vocabulary is only multiplied with the hidden states of targets: for short answers behind long prompts this
    is most of the head's work saved.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = causal.device
    layout = RowLayout.make(row.prefix, row.rest_lengths, dtype, device)
    tokens = torch.tensor([row.tokens], device=device)
    positions = layout.positions()[None]
    hidden_TE = causal.model(input_ids=tokens, position_ids=positions, use_cache=False, layout=layout)[0][0]
    sources_M, targets_M = torch.tensor(row.targets, device=device).T
    return causal.lm_head(hidden_TE.index_select(0, sources_M)).float(), targets_M


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in ``dtype`` while adapters stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class ScoredTarget:
    """The outcome at one target token."""

    __slots__ = ("chosen", "logprob", "token")

    def __init__(self, token: int, chosen: int, logprob: float) -> None:
        self.token = token
        self.chosen = chosen
        self.logprob = logprob


def score_examples(
    model: Any, examples: Sequence[TokenizedExample], tokens_per_row: int = 1024
) -> Iterator[tuple[int, list[ScoredTarget]]]:
    """Yield (index of the example, its targets scored) for every example, in the order of the rows.

    For each target token: its natural log-probability, and the token that the model itself would choose there.
    """
    dtype = next(model.parameters()).dtype
    prefix = shared_prefix(examples)
    for row in pack(examples, prefix, tokens_per_row):
        with torch.inference_mode(), autocast(dtype, model.device):
            logits_MV, targets_M = target_logits(model, row, dtype)
            logprobs_MV = torch.log_softmax(logits_MV, dim=-1)
            logprobs = logprobs_MV.gather(1, targets_M[:, None])[:, 0].tolist()
            chosen = logits_MV.argmax(dim=-1).tolist()
        scored: list[list[ScoredTarget]] = [[] for _ in row.examples]
        for owner, (_, token), choice, logprob in zip(row.owners, row.targets, chosen, logprobs, strict=True):
            scored[owner].append(ScoredTarget(token, choice, logprob))
        yield from zip(row.examples, scored, strict=True)
