"""Why a grader gave no score."""

from __future__ import annotations

from luthier.errors import LuthierError
from luthier.records.grader import GradingErrorKind


class GradingError(LuthierError):
    """A grader gave no score for a sample; ``kind`` is OpenAI's word for the reason."""

    def __init__(self, kind: GradingErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def is_of_sample(self) -> bool:
        """Whether the sample is to blame: then it fails, and nothing is wrong with the grader."""
        return self.kind == "sample_parse_error"
