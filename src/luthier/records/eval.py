"""Evals as OpenAI's clients know them: what is tested by which graders, runs of it, and what came out item by item."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from luthier.records.grader import TemplateMessage, Written
from luthier.records.record import Record
from luthier.records.stored import Metadata, Stored

EvalRunStatus = Literal["queued", "in_progress", "completed", "canceled", "failed"]
ItemStatus = Literal["pass", "fail", "error"]
MAX_CRITERIA = 64
Json = dict[str, Any]


# What clients write


class CustomData(Written):
    """Items of a shape of one's own."""

    type: Literal["custom"]
    item_schema: Json
    include_sample_schema: bool | None = None


class LoggedData(Written):
    """What the production log holds: stored completions with some labels."""

    type: Literal["logs", "stored_completions"]
    metadata: Metadata | None = None


class GivenChoice(Written):
    """An answer, as chat completions have it."""

    message: Json | None = None


class GivenSample(Written):
    """A sample that is there already; templates can name its other fields too."""

    output_text: str | None = None
    output_tools: list[Json] | None = None
    choices: list[GivenChoice] | None = None


class GivenRow(Written):
    """An item, and a sample where there is one already."""

    item: Json
    sample: GivenSample | None = None


class FileContent(Written):
    """Rows in the request itself."""

    type: Literal["file_content"]
    content: list[GivenRow] = Field(min_length=1)


class FileId(Written):
    """Rows of an uploaded file: each line has ``item`` and, if there is one, ``sample``."""

    type: Literal["file_id"]
    id: str = Field(min_length=1)


class LoggedCompletions(Written):
    """Stored completions; times are Unix seconds."""

    type: Literal["stored_completions"]
    metadata: Metadata | None = None
    model: str | None = None
    created_after: int | None = None
    created_before: int | None = None
    limit: int | None = Field(None, ge=1)


class LoggedResponses(Written):
    """Responses that are kept; times are Unix seconds, ``tools`` are names."""

    type: Literal["responses"]
    metadata: Metadata | None = None
    model: str | None = None
    created_after: int | None = None
    created_before: int | None = None
    instructions_search: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning_effort: str | None = None
    tools: list[str] | None = None
    users: list[str] | None = None


class TemplateMessages(Written):
    """Messages to a model, as templates over ``item``."""

    type: Literal["template"]
    template: list[TemplateMessage] = Field(min_length=1)


class ItemReference(Written):
    """Messages to a model that the item has, such as ``item.input``."""

    type: Literal["item_reference"]
    item_reference: str = Field(pattern=r"^item\..+")


class SamplingParams(Written):
    """How a model is asked for samples. ``text`` is the form of answers of ``/v1/responses``."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    response_format: Json | None = None
    text: Json | None = None
    tools: list[Json] | None = None
    reasoning_effort: str | None = None


class RunSource(Written):
    """Where a run takes its items and samples from; ``source`` and ``input_messages`` are read by their own types."""

    type: Literal["jsonl", "completions", "responses"]
    source: Json
    model: str | None = Field(None, min_length=1)
    input_messages: Json | None = None
    sampling_params: SamplingParams | None = None


LoggedSource = LoggedCompletions | LoggedResponses
RowSource = FileContent | FileId | LoggedSource
InputMessages = TemplateMessages | ItemReference


# What is kept


class Eval(Stored):
    """What is tested: where items come from, and the graders, both as the client wrote them."""

    name: str
    updated_at: int
    data_source_config: Json
    testing_criteria: tuple[Json, ...]


class CriterionTally(Record):
    """How many items passed a grader."""

    passed: int = 0
    failed: int = 0


class ModelTally(Record):
    """What a model took."""

    invocation_count: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: ModelTally) -> ModelTally:
        """Return the sum of two."""
        return ModelTally(**{name: value + getattr(other, name) for name, value in self})


class RunTally(Record):
    """What has come out so far; ``criteria`` by the graders' names, ``models`` by the models'."""

    passed: int = 0
    failed: int = 0
    errored: int = 0
    criteria: dict[str, CriterionTally] = Field(default_factory=dict)
    models: dict[str, ModelTally] = Field(default_factory=dict)

    def with_item(self, item: OutputItem) -> RunTally:
        """Return the tally with one more item."""
        field = {"pass": "passed", "fail": "failed", "error": "errored"}[item.status]
        criteria = dict(self.criteria)
        for result in item.results:
            before = criteria.get(result["name"], CriterionTally())
            outcome = "passed" if result["passed"] else "failed"
            criteria[result["name"]] = before.model_copy(update={outcome: getattr(before, outcome) + 1})
        models = dict(self.models)
        for model, used in item.usage.items():
            models[model] = models.get(model, ModelTally()) + used
        change = {field: getattr(self, field) + 1, "criteria": criteria, "models": models}
        return self.model_copy(update=change)


class EvalRun(Stored):
    """A run of an eval (``parent``). Its status is that of the run in the queue that has the same id.

    What it is to do lies in that run's folder, since its items may be many.
    """

    parent: str
    name: str
    model: str
    tally: RunTally = RunTally()


class RunPlan(Record):
    """What a run is to do, as it was written when the run was made.

    ``logged_metadata`` are the labels of the logged completions, where the source of the run names none.
    """

    data_source: Json
    item_schema: Json | None
    logged_metadata: Json | None
    criteria: tuple[Json, ...]


class OutputItem(Stored):
    """What came of one item of a run (``parent``): the sample, and what each grader said."""

    parent: str
    eval_id: str
    status: ItemStatus
    number: int
    item: Json
    sample: Json
    results: tuple[Json, ...]
    usage: dict[str, ModelTally] = Field(default_factory=dict)
