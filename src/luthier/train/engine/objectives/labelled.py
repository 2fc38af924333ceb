"""Learning labels and numbers of texts: classification and regression, on encoders and on decoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.functional import cross_entropy

from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.row_model import RowModel
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.objectives.objective import OnProgress, PartLoss, total_weight


@dataclass
class Labelled:
    """The weighted mean over texts of the label's cross-entropy, or of the squared error of a number."""

    model: EncoderModel | RowModel
    method: Literal["classification", "regression"]
    tokens_per_row: int

    def prepare(
        self, units: Iterable[TokenizedExample], folder: Path, fingerprint: str, on_progress: OnProgress
    ) -> None:
        """Nothing stays the same here."""

    def losses(self, units: Sequence[TokenizedExample], *, training: bool) -> Iterator[PartLoss]:
        """Yield one part per batch of similar lengths (encoders) or row (decoders)."""
        total = total_weight(unit.weight for unit in units)
        for indices, outputs_NC in self.model.outputs(units, self.tokens_per_row):
            labels_N = torch.tensor([units[index].label for index in indices], device=outputs_NC.device)
            weights_N = torch.tensor([units[index].weight for index in indices], device=outputs_NC.device)
            if self.method == "classification":
                losses_N = cross_entropy(outputs_NC, labels_N.long(), reduction="none")
                sums = {"accuracy": (float((outputs_NC.argmax(-1) == labels_N).sum()), float(len(indices)))}
            else:
                errors_N = outputs_NC[:, 0] - labels_N
                losses_N = errors_N.square()
                sums = {"mean_absolute_error": (float(errors_N.detach().abs().sum()), float(len(indices)))}
            yield PartLoss((losses_N * weights_N).sum() / total, sums)
