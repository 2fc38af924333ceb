"""Training: from a divided dataset to a registered model whose forms are proven to agree."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier.errors import InputError, ParityError, RunStopped
from luthier.evaluate.contest import sample
from luthier.jobs.context import RunContext
from luthier.jobs.launch import OnEvent, follow, submit
from luthier.llm.engine.torch_model import measure_machine, save_merged
from luthier.records.base_model import BaseModelInfo, Machine
from luthier.records.dataset import DatasetVersion
from luthier.records.example import Conversation, Example
from luthier.records.model import Artifact, Parity, TunedModel, tuned_name
from luthier.records.record import Record
from luthier.records.template import TemplateVersion
from luthier.records.training import StepMetrics, TrainingConfig, TrainingPlan, TrainingResult
from luthier.settings import load_settings
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import (
    RenderPolicy,
    RenderReport,
    TemplateRenderer,
    TokenizedExample,
    tokenize,
)
from luthier.train.engine.loop import TrainingJob, best_adapter, train
from luthier.train.engine.tensorboard import TensorBoardLog
from luthier.train.hyperparameters import max_tokens
from luthier.train.plan import plan_training
from luthier.workflows.datasets import side
from luthier.workflows.models import SERVED_FORM, make_gguf, served_folder, shape
from luthier.workflows.parity import MAX_ANSWER_TOKENS, measure_parity

EVENT_SECONDS = 0.5


class TrainRequest(Record):
    """What to train: a base on a divided dataset through a template.

    ``parity_prompts`` held-out prompts prove that adapter, merged, GGUF and served model agree on at least
    ``parity_limit`` of the answer tokens; 0 leaves the proof out.
    """

    base: str
    dataset: str
    template: str | None = None
    suffix: str = ""
    options: TrainingConfig = TrainingConfig()
    parity_prompts: int = Field(64, ge=0)
    parity_limit: float = Field(0.97, gt=0, le=1)


@dataclass(frozen=True)
class _Prepared:
    """Everything that a request names, looked up and rendered."""

    request: TrainRequest
    base: BaseModelInfo
    base_folder: Path
    dataset: DatasetVersion
    template: TemplateVersion | None
    chat_format: ChatFormat
    examples: list[TokenizedExample]
    validation: list[TokenizedExample]
    held_out: list[Conversation]
    report: RenderReport

    def plan(self, machine: Machine) -> TrainingPlan:
        """Plan the run on a machine."""
        sizes = shape(self.base_folder, self.base.parameters)
        return plan_training(self.examples, self.validation, self.report, self.request.options, sizes, machine)


def plan(store: Store, request: TrainRequest) -> TrainingPlan:
    """Say what a training run would do: examples, tokens, steps, memory, time, and every choice with its reason.

    Raises:
        NotFoundError: the base, dataset or template is not there.
        InputError: examples cannot be learned as they are.
        CapacityError: the run cannot fit into this machine.
    """
    return _prepare(store, request).plan(measure_machine())


def train_model(store: Store, request: TrainRequest, on_event: OnEvent | None = None) -> TunedModel:
    """Train, export, prove parity and register, in a process of its own; return the registered model.

    Raises:
        RunStopped: the run was paused or cancelled.
        LuthierError: the run failed; the message is its own.
    """
    run = follow(store, submit(store, "train", request.model_dump(mode="json")).id, on_event)
    return store.models.get(finished_result(store, run.id)["model"])


def finished_result(store: Store, run_id: str) -> dict[str, Any]:
    """Return the result of a run that succeeded.

    Raises:
        RunStopped: it was paused or cancelled.
        InputError: it failed.
    """
    run = store.runs.get(run_id)
    if run.status == "failed":
        raise InputError(f"Run {run_id} failed: {run.error}")
    if run.status != "succeeded" or run.result is None:
        message = f"Run {run_id} is {run.status}." + (f" {run.error}" if run.error else "")
        raise RunStopped(message, hint=f"luthier run resume {run_id}")
    return run.result


def execute(context: RunContext) -> dict[str, Any]:
    """Carry out a training run; every stage that is done already is found and not repeated."""
    store = context.store
    prepared = _prepare(store, TrainRequest.model_validate(context.run.config))
    with context.stage("plan"):
        made = prepared.plan(measure_machine())
        context.say(f"{made.steps} steps over {made.examples} examples", data=made.model_dump(mode="json"))
    name = tuned_name(prepared.base.id, load_settings().organisation, prepared.request.suffix, context.run.id)
    with context.stage("train"):
        result, adapter_folder = _train(context, prepared, made)
    with context.stage("export"):
        artifacts = _export(store, prepared, name, adapter_folder)
    with context.stage("parity"):
        parity = _parity(context, prepared, name, artifacts)
    model = _record(context, prepared, made, name, result, artifacts, parity)
    store.models.add(model)
    context.say(f"New model: {name}")
    return {"model": name}


def code_version() -> str:
    """Return the versions of Luthier (with its git commit, in a checkout) and of the libraries that make a model."""
    names = ("luthier", "torch", "transformers", "peft", "openvino-genai")
    versions = [f"{name} {metadata.version(name)}" for name in names]
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        versions[0] += "+" + subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # installed from a wheel
    return ", ".join(versions)


def _prepare(store: Store, request: TrainRequest) -> _Prepared:
    base = store.models.base(request.base)
    served_folder(store, base.id)  # a base that cannot be served is refused now, not after the training
    folder = store.models.base_folder(base)
    dataset = store.datasets.get(request.dataset)
    template = store.templates.get(request.template) if request.template else None
    renderer = TemplateRenderer(template.template if template else None, dataset.fields)
    chat_format = ChatFormat.load(folder)
    options = request.options
    policy = RenderPolicy(
        max_tokens=max_tokens(options, shape(folder, base.parameters)),
        too_long=options.too_long,
        empty_mask=options.empty_mask,
        missing_end_of_turn=options.missing_end_of_turn,
    )

    def conversations(examples: list[Example]) -> list[Conversation]:
        return [renderer.conversation(example) for example in examples]

    examples, report = tokenize(conversations(side(store, dataset, "train")), chat_format, policy)
    validation = conversations(side(store, dataset, "validation"))
    held_out = [
        conversation
        for conversation in conversations(side(store, dataset, "test"))
        if len(chat_format.prompt_tokens(conversation.prompt)) + MAX_ANSWER_TOKENS <= chat_format.context_length
    ]
    return _Prepared(
        request=request,
        base=base,
        base_folder=folder,
        dataset=dataset,
        template=template,
        chat_format=chat_format,
        examples=examples,
        validation=tokenize(validation, chat_format, policy)[0] if validation else [],
        held_out=held_out,
        report=report,
    )


def _train(context: RunContext, prepared: _Prepared, made: TrainingPlan) -> tuple[TrainingResult, Path]:
    job = TrainingJob(
        plan=made,
        examples=prepared.examples,
        validation=prepared.validation,
        base_folder=prepared.base_folder,
        base_name=prepared.base.id,
        folder=context.folder / "checkpoints",
    )
    with TensorBoardLog(context.folder / "tensorboard") as board:
        watch = _Watch(context, board.write)
        return train(job, watch, context.stop_if_asked), best_adapter(job)


class _Watch:
    """Passes training metrics on: all of them to TensorBoard, to the run's events at most two a second."""

    def __init__(self, context: RunContext, write: Callable[[StepMetrics], None]) -> None:
        self._context = context
        self._write = write
        self._last = 0.0

    def __call__(self, metrics: StepMetrics) -> None:
        self._write(metrics)
        now = time.monotonic()
        if now - self._last < EVENT_SECONDS and metrics.valid_loss is None and metrics.step != metrics.steps:
            return
        self._last = now
        text = f"Step {metrics.step}/{metrics.steps}: training loss={metrics.train_loss:.3f}"
        if metrics.valid_loss is not None:
            text += f", validation loss={metrics.valid_loss:.3f}"
        self._context.metrics(text, metrics.model_dump(mode="json"))


def _export(store: Store, prepared: _Prepared, name: str, adapter_folder: Path) -> dict[str, Artifact]:
    def copy_adapter(folder: Path) -> None:
        for path in adapter_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    adapter = store.models.add_artifact(name, "adapter", copy_adapter)
    merged = store.models.add_artifact(
        name,
        "merged",
        lambda folder: save_merged(prepared.base_folder, store.models.artifact_folder(adapter), folder),
    )
    gguf = make_gguf(store, name, SERVED_FORM, store.models.artifact_folder(merged))
    return {"adapter": adapter, "merged": merged, SERVED_FORM: gguf}


def _parity(context: RunContext, prepared: _Prepared, name: str, artifacts: dict[str, Artifact]) -> Parity | None:
    request = prepared.request
    if request.parity_prompts == 0:
        return None
    parity = measure_parity(
        context.store,
        name,
        prepared.base_folder,
        artifacts,
        sample(prepared.held_out, request.parity_prompts, prepared.request.options.seed),
        request.parity_limit,
    )
    context.say("Parity measured", data=parity.model_dump(mode="json"))
    if not parity.passed:
        raise ParityError(
            f"The forms of {name} agree on less than {request.parity_limit:.0%} of the tokens; it is not registered.",
            problems=[
                f"{form.form}: {form.token_agreement:.1%} of tokens agree with the adapter" for form in parity.forms
            ],
            hint="train longer (an undecided model flips on rounding), or lower parity_limit knowingly",
        )
    return parity


def _record(
    context: RunContext,
    prepared: _Prepared,
    made: TrainingPlan,
    name: str,
    result: TrainingResult,
    artifacts: dict[str, Artifact],
    parity: Parity | None,
) -> TunedModel:
    return TunedModel(
        name=name,
        base=prepared.base.id,
        base_sha256=prepared.base.sha256,
        run_id=context.run.id,
        dataset=prepared.dataset.reference,
        dataset_hash=prepared.dataset.content_hash,
        template=prepared.template,
        hyperparameters=made.resolved,
        options=prepared.request.options.model_dump(mode="json"),
        seed=made.resolved.seed,
        code_version=code_version(),
        training=result,
        parity=parity,
        artifacts=artifacts,
        licence=prepared.base.licence,
        created_at=datetime.now(UTC),
    )
