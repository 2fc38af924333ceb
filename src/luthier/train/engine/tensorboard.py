"""Training metrics as TensorBoard event files."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from luthier.records.training import StepMetrics

SCALARS = {
    "loss/train": "train_loss",
    "loss/validation": "valid_loss",
    "accuracy/train_tokens": "train_token_accuracy",
    "accuracy/validation_tokens": "valid_token_accuracy",
    "optimizer/learning_rate": "learning_rate",
    "optimizer/gradient_norm": "gradient_norm",
    "speed/tokens_per_second": "tokens_per_second",
}


class TensorBoardLog:
    """Writes one event file into a folder; look at it with ``tensorboard --logdir``."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def write(self, metrics: StepMetrics) -> None:
        """Write every number of a step that is there."""
        for tag, name in SCALARS.items():
            value = getattr(metrics, name)
            if value is not None:
                self._writer.add_scalar(tag, value, metrics.step)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
