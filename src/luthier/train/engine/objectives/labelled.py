"""Learning labels and numbers of texts: classification and regression, on encoders and on decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.nn.functional import cross_entropy

from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.row_model import RowModel
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.objectives.objective import OnProgress, Part, PartLoss, total_weight


@dataclass
class Labelled:
    """The weighted mean over texts of the label's cross-entropy, or of the squared error of a number."""

    model: EncoderModel | RowModel
    method: Literal["classification", "regression"]
    tokens_per_row: int

    def prepare(
        self, units: Sequence[TokenizedExample], folder: Path, fingerprint: str, on_progress: OnProgress
    ) -> None:
        """Nothing stays the same here."""

    def losses(self, units: Sequence[TokenizedExample], *, training: bool) -> list[Part]:
        """Return one part per batch of similar lengths (encoders) or row (decoders)."""
        total = total_weight(unit.weight for unit in units)
        batches = self.model.batches(units, self.tokens_per_row)
        return [partial(self._part, [units[index] for index in indices], ask, total) for indices, ask in batches]

    def _part(self, units: Sequence[TokenizedExample], ask: Callable[[], torch.Tensor], total: float) -> PartLoss:
        outputs_NC = ask()
        labels_N = torch.tensor([unit.label for unit in units], device=outputs_NC.device)
        weights_N = torch.tensor([unit.weight for unit in units], device=outputs_NC.device)
        if self.method == "classification":
            losses_N = cross_entropy(outputs_NC, labels_N.long(), reduction="none")
            sums = {"accuracy": (float((outputs_NC.argmax(-1) == labels_N).sum()), float(len(units)))}
        else:
            errors_N = outputs_NC[:, 0] - labels_N
            losses_N = errors_N.square()
            sums = {"mean_absolute_error": (float(errors_N.detach().abs().sum()), float(len(units)))}
        return PartLoss((losses_N * weights_N).sum() / total, sums)
