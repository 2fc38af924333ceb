"""A model that takes rows: hidden states once, the vocabulary only where there is a target.

Training, scoring and parity come through here, so that all of them see the same numbers.

Names end in their dimensions: T tokens of the row, M targets, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from luthier.llm.engine.fused_decoder import FusedDecoder, can_fuse
from luthier.llm.engine.row_layout import RowLayout
from luthier.llm.engine.target_logprobs import Targets, target_logprobs
from luthier.llm.rows import Row, pack, shared_prefix
from luthier.templates.renderer import TokenizedExample

Noise = Callable[[torch.Tensor, Row], torch.Tensor]
"""Changes the embeddings (T, E) of a row while training."""


class RowModel:
    """A decoder with its head (of a vocabulary, or a score), with or without an adapter, asked in rows.

    The layers run fused where the family is known (:mod:`luthier.llm.engine.fused_decoder`), else as transformers
    has them, and compute in ``dtype`` (None: that of the weights). ``recompute`` keeps only each layer's input for the
    backward pass: less memory, a third more work.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype | None = None, *, recompute: bool = False, fused: bool = True
    ) -> None:
        self.model = model
        self._inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = self._inner.model
        self.dtype: torch.dtype = dtype or self._decoder.embed_tokens.weight.dtype
        self.device: torch.device = self._decoder.embed_tokens.weight.device
        self._fused = FusedDecoder(self._decoder, recompute=recompute) if fused and can_fuse(self._decoder) else None
        if recompute and self._fused is None:
            self._inner.gradient_checkpointing_enable()

    @property
    def is_fused(self) -> bool:
        """Whether the layers run as fused functions."""
        return self._fused is not None

    def hidden(self, row: Row, noise: Noise | None = None) -> torch.Tensor:
        """Return the last hidden states (T, E) of a row, after the final norm."""
        layout = RowLayout.make(row.groups, self.device)
        embedded_TE = self._decoder.embed_tokens(torch.tensor(row.tokens, device=self.device)).to(self.dtype)
        if noise is not None:
            embedded_TE = noise(embedded_TE, row)
        if self._fused is not None:
            return self._fused.forward(embedded_TE, layout)
        positions_1T = layout.positions_T[None]
        with autocast(self.dtype, self.device):
            states = self._decoder(
                inputs_embeds=embedded_TE[None], position_ids=positions_1T, use_cache=False, layout=layout
            )
        return states[0][0]

    def targets(self, row: Row, label_smoothing: float = 0.0, noise: Noise | None = None) -> Targets:
        """Return the log-probabilities of a row's targets, (M,), with gradient, and the tokens chosen instead."""
        sources_M, targets_M = torch.tensor(row.targets, device=self.device).T
        hidden_ME = self.hidden(row, noise).index_select(0, sources_M)
        return target_logprobs(hidden_ME, self._inner.lm_head, targets_M, label_smoothing)

    def batches(
        self, examples: Sequence[TokenizedExample], tokens_per_row: int
    ) -> list[tuple[list[int], Callable[[], torch.Tensor]]]:
        """Return (indices of examples, a function that gives the score head's outputs at their last tokens).

        Outputs are (N, outputs), in float32.
        """
        rows = pack(examples, shared_prefix(examples), tokens_per_row)
        return [(list(row.examples), partial(self.row_outputs, row)) for row in rows]

    def row_outputs(self, row: Row) -> torch.Tensor:
        """Return the outputs of the score head at each example's last token, (N, outputs), in float32."""
        hidden_NE = self.hidden(row).index_select(0, torch.tensor(row.ends, device=self.device))
        score = self._inner.score
        return score(hidden_NE.to(next(score.parameters()).dtype)).float()


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
    model: RowModel, examples: Sequence[TokenizedExample], tokens_per_row: int = 1024
) -> Iterator[tuple[int, list[ScoredTarget]]]:
    """Yield (index of the example, its targets scored) for every example, in the order of the rows.

    For each target token: its natural log-probability, and the token that the model itself would choose there.
    """
    for row in pack(examples, shared_prefix(examples), tokens_per_row):
        with torch.no_grad():
            found = model.targets(row)
        scored: list[list[ScoredTarget]] = [[] for _ in row.examples]
        outcomes = zip(row.owners, row.targets, found.chosen_M.tolist(), found.logprobs_M.tolist(), strict=True)
        for owner, (_, token), choice, logprob in outcomes:
            scored[owner].append(ScoredTarget(token, choice, logprob))
        yield from zip(row.examples, scored, strict=True)
