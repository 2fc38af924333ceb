"""Encoders (the BERT family) with a classification head, asked in batches of texts of similar length.

Names end in their dimensions: N texts, L tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from luthier.llm.engine.row_model import autocast
from luthier.llm.engine.text_batches import by_length, padded
from luthier.templates.renderer import TokenizedExample


class EncoderModel:
    """An encoder with a head of labels or a number, with or without an adapter."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None, *, recompute: bool = False) -> None:
        self.model = model
        self.dtype = dtype or next(model.parameters()).dtype
        self.device = next(model.parameters()).device
        if recompute:
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            inner.gradient_checkpointing_enable()

    def batches(
        self, examples: Sequence[TokenizedExample], tokens_per_batch: int
    ) -> list[tuple[list[int], Callable[[], torch.Tensor]]]:
        """Return (indices of examples, a function that gives the head's outputs of them), shortest texts first.

        Outputs are (N, outputs), in float32.
        """
        batches = by_length([len(example.tokens) for example in examples], tokens_per_batch)
        return [(indices, partial(self._outputs, [examples[index] for index in indices])) for indices in batches]

    def _outputs(self, examples: Sequence[TokenizedExample]) -> torch.Tensor:
        tokens_NL, real_NL = padded([example.tokens for example in examples])
        with autocast(self.dtype, self.device):
            found = self.model(input_ids=tokens_NL.to(self.device), attention_mask=real_NL.to(self.device))
        outputs_NC: torch.Tensor = found.logits.float()
        return outputs_NC
