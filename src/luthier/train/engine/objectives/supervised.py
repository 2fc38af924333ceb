"""Supervised learning: the cross-entropy of the tokens that are to be learned. Raw text is the same with all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from luthier.llm.engine.row_model import Noise, RowModel
from luthier.llm.rows import Row
from luthier.records.objectives import SupervisedOptions
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.noise import example_lengths, neftune
from luthier.train.engine.objectives.objective import OnProgress, Part, PartLoss, total_weight


@dataclass
class Supervised:
    """The weighted mean over all target tokens of a batch: sum w (-log p) / sum w.

    ``token_accuracy`` counts targets that the model would choose itself.
    """

    model: RowModel
    options: SupervisedOptions
    tokens_per_row: int

    def prepare(
        self, units: Sequence[TokenizedExample], folder: Path, fingerprint: str, on_progress: OnProgress
    ) -> None:
        """Nothing stays the same here."""

    def losses(self, units: Sequence[TokenizedExample], *, training: bool) -> list[Part]:
        """Return one part per row."""
        rows = self.model.pack(units, self.tokens_per_row)
        total = total_weight(weight for row in rows for weight in row.weights)
        noise = self._noise if training and self.options.neftune_alpha else None
        smoothing = self.options.label_smoothing if training else 0.0
        return [partial(self._part, row, total, smoothing, noise) for row in rows if row.targets]

    def _part(self, row: Row, total: float, smoothing: float, noise: Noise | None) -> PartLoss:
        found = self.model.targets(row, smoothing, noise)
        weights_M = torch.tensor(row.weights, device=found.logprobs_M.device)
        right = int((found.chosen_M.cpu() == torch.tensor([token for _, token in row.targets])).sum())
        loss = -(found.logprobs_M * weights_M).sum() / total
        return PartLoss(loss, {"token_accuracy": (right, len(row.targets))})

    def _noise(self, embedded_TE: torch.Tensor, row: Row) -> torch.Tensor:
        return neftune(embedded_TE, self.options.neftune_alpha, example_lengths(row.groups))
