"""Graders: how an answer is scored, as OpenAI's clients write it down."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SimilarityMetric = Literal[
    "cosine",
    "fuzzy_match",
    "bleu",
    "gleu",
    "meteor",
    "rouge_1",
    "rouge_2",
    "rouge_3",
    "rouge_4",
    "rouge_5",
    "rouge_l",
]
GradingErrorKind = Literal[
    "formula_parse_error",
    "sample_parse_error",
    "invalid_variable_error",
    "unresponsive_reward_error",
    "python_grader_runtime_error",
    "model_grader_server_error",
    "model_grader_refusal_error",
    "model_grader_parse_error",
    "other_error",
]
MAX_NAME = 256
MAX_SOURCE = 256 * 1024
MAX_FORMULA = 500


class Written(BaseModel):
    """A part of what a client wrote: unknown fields are tolerated, numbers in quotes are not."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


class TextContent(Written):
    """A piece of a message; only text is known."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class TemplateMessage(Written):
    """A message whose content is a handlebars template over ``item`` and ``sample``."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | TextContent | list[str | TextContent]

    @property
    def text(self) -> str:
        """The content in one piece."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        return "".join(part if isinstance(part, str) else part.text for part in parts)


class GraderSampling(Written):
    """How a model that grades is asked."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    max_completions_tokens: int | None = Field(None, ge=1)
    reasoning_effort: str | None = None


class _Named(Written):
    name: str = Field(min_length=1, max_length=MAX_NAME)


class StringCheckGrader(_Named):
    """1 where ``input`` and ``reference`` are equal (eq), differ (ne), or the one contains the other (like, ilike)."""

    type: Literal["string_check"]
    input: str
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarityGrader(_Named):
    """How alike ``input`` and ``reference`` are, from 0 to 1."""

    type: Literal["text_similarity"]
    input: str
    reference: str
    evaluation_metric: SimilarityMetric
    pass_threshold: float | None = None


class LabelModelGrader(_Named):
    """1 where a model chooses one of ``passing_labels`` out of ``labels``."""

    type: Literal["label_model"]
    model: str = Field(min_length=1)
    input: list[TemplateMessage] = Field(min_length=1)
    labels: list[str] = Field(min_length=1, max_length=256)
    passing_labels: list[str] = Field(min_length=1)


class ScoreModelGrader(_Named):
    """The score that a model gives, within ``range`` (0 to 1 where none is given)."""

    type: Literal["score_model"]
    model: str = Field(min_length=1)
    input: list[TemplateMessage] = Field(min_length=1)
    range: list[float] | None = Field(None, min_length=2, max_length=2)
    sampling_params: GraderSampling | None = None
    pass_threshold: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest score."""
        low, high = self.range or (0.0, 1.0)
        return low, high


class PythonGrader(_Named):
    """What the ``grade(sample, item)`` that ``source`` defines returns. ``image_tag`` names OpenAI's interpreter."""

    type: Literal["python"]
    source: str = Field(min_length=1, max_length=MAX_SOURCE)
    image_tag: str | None = None
    pass_threshold: float | None = None


SingleGrader = StringCheckGrader | TextSimilarityGrader | LabelModelGrader | ScoreModelGrader | PythonGrader


class MultiGrader(_Named):
    """What a formula over the scores of other graders gives; they stand under the names that it uses."""

    type: Literal["multi"]
    graders: dict[str, SingleGrader] = Field(min_length=1, max_length=64)
    calculate_output: str = Field(min_length=1, max_length=MAX_FORMULA)


Grader = SingleGrader | MultiGrader
GRADERS: dict[str, type[Grader]] = {
    "string_check": StringCheckGrader,
    "text_similarity": TextSimilarityGrader,
    "label_model": LabelModelGrader,
    "score_model": ScoreModelGrader,
    "python": PythonGrader,
    "multi": MultiGrader,
}
