"""Training: from a divided dataset to a registered model whose forms are proven to agree."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.errors import InputError, ParityError, RunStopped
from luthier.evaluate.contest import sample
from luthier.jobs.context import RunContext
from luthier.jobs.launch import OnEvent, follow, submit
from luthier.llm.engine.merging import save_merged, save_whole
from luthier.llm.engine.torch_model import measure_machine
from luthier.records.model import Artifact, Parity, TunedModel, tuned_name
from luthier.records.objectives import PAIRED, product
from luthier.records.training import TrainingPlan, TrainingResult
from luthier.settings import load_settings
from luthier.store.store import Store
from luthier.train.engine.loop import TrainingJob, best_adapter, train
from luthier.train.engine.probe import measured_plan
from luthier.train.engine.trackers import check_trackers, open_trackers
from luthier.workflows.checkpoints import STATE_FOLDER
from luthier.workflows.material import Prepared, TrainRequest, prepare
from luthier.workflows.models import SERVED_FORM, make_gguf
from luthier.workflows.parity import MAX_ANSWER_TOKENS, measure_parity
from luthier.workflows.step_metrics import StepLog, add_result_file, read_plan, write_plan
from luthier.workflows.training_files import dataset_of_files
from luthier.workflows.training_watch import TrainingWatch

__all__ = ["TrainRequest", "code_version", "execute", "finished_result", "plan", "train_model"]

SHORT_SECONDS = 60.0  # a run that is shorter, and that surely fits, starts without steps being measured first
SURE_SHARE = 0.5


def plan(store: Store, request: TrainRequest, *, measure: bool = True) -> TrainingPlan:
    """Say what a training run would do: examples, tokens, steps, memory, time, and every choice with its reason.

    With ``measure`` two steps are really made at the longest length, in a process of its own.

    Raises:
        NotFoundError: the base, dataset or template is not there.
        InputError: examples cannot be learned as they are.
        CapacityError: the run cannot fit into this machine.
    """
    check_trackers(request.options.trackers)
    with TemporaryDirectory() as scratch:
        prepared = prepare(store, request, MAX_ANSWER_TOKENS, Path(scratch))
        machine = measure_machine()
        made = prepared.plan(machine)
        return measured_plan(_job(prepared, made, Path(scratch)), request.options, machine) if measure else made


def train_model(store: Store, request: TrainRequest, on_event: OnEvent | None = None) -> TunedModel:
    """Train, export, prove parity and register, in a process of its own; return the registered model.

    Raises:
        RunStopped: the run was paused or cancelled.
        LuthierError: the run failed; the message is its own.
    """
    run = follow(store, submit(store, "train", request).id, on_event)
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
        raise RunStopped(message, hint=None if run.status == "cancelled" else f"luthier run resume {run_id}")
    return run.result


def execute(context: RunContext) -> dict[str, Any]:
    """Carry out a training run; every stage that is done already is found and not repeated."""
    store = context.store
    request = TrainRequest.model_validate(context.run.config)
    prepared = _prepared(context, request)
    with context.stage("plan"):
        made = _planned(context, prepared)
        context.say(f"{made.steps} steps over {made.examples} examples", data=made.model_dump(mode="json"))
    name = tuned_name(prepared.base.id, load_settings().organisation, prepared.request.suffix, context.run.id)
    with context.stage("train"):
        result, best_folder = _train(context, prepared, made, name)
    with context.stage("export"):
        artifacts = _export(store, prepared, name, best_folder)
    parity = None
    if SERVED_FORM in artifacts:
        with context.stage("parity"):
            parity = _parity(context, prepared, name, artifacts)
    model = _record(context, prepared, made, name, result, artifacts, parity)
    store.models.add(model)
    context.say(f"New fine-tuned model created: {name}")
    results = add_result_file(store, context.run)
    context.say("The job has successfully completed")
    return {"model": name, "result_files": [results], "trained_tokens": result.trained_tokens}


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


def _prepared(context: RunContext, request: TrainRequest) -> Prepared:
    """Look up what the run learns from; of uploaded files a dataset is made first."""
    scratch = context.folder / "tokens"
    if request.files is None:
        return prepare(context.store, request, MAX_ANSWER_TOKENS, scratch)
    with context.stage("validate files"):
        pairs = request.options.method in PAIRED
        dataset = dataset_of_files(context.store, context.run.project, request.files, pairs=pairs)
        found = request.model_copy(update={"dataset": dataset.reference})
        prepared = prepare(context.store, found, MAX_ANSWER_TOKENS, scratch)
    context.say("Files validated")
    return prepared


def _planned(context: RunContext, prepared: Prepared) -> TrainingPlan:
    """Return the run's plan; one that goes on keeps the plan that it began with."""
    known = read_plan(context.folder)
    if known is not None:
        return known
    machine = measure_machine()
    made = prepared.plan(machine)
    if made.seconds > SHORT_SECONDS or made.memory_bytes > SURE_SHARE * made.machine_memory_bytes:
        made = measured_plan(_job(prepared, made, context.folder), prepared.request.options, machine, context.say)
    write_plan(context.folder, made)
    return made


def _job(prepared: Prepared, made: TrainingPlan, folder: Path) -> TrainingJob:
    options, chat_format = prepared.request.options, prepared.chat_format
    asked = sample(prepared.sampled, options.samples, options.seed)
    return TrainingJob(
        plan=made,
        examples=prepared.material.examples,
        validation=prepared.material.validation,
        base_folder=prepared.base_folder,
        base_name=prepared.base.id,
        folder=folder / STATE_FOLDER,
        test=prepared.test,
        labels=prepared.labels,
        start_adapter=prepared.start_adapter,
        sample_prompts=tuple(tuple(chat_format.prompt_tokens(one.prompt)) for one in asked) if chat_format else (),
        sample_tokens=options.sample_tokens,
        stop_tokens=frozenset(chat_format.stop_tokens) if chat_format else frozenset(),
        epoch_weights=prepared.request.files is not None,
        base_sha256=prepared.base.sha256,
    )


def _train(context: RunContext, prepared: Prepared, made: TrainingPlan, name: str) -> tuple[TrainingResult, Path]:
    job = _job(prepared, made, context.folder)
    config = context.run.config
    with (
        open_trackers(prepared.request.options.trackers, context.folder, context.run.id, config) as trackers,
        StepLog(context.folder) as log,
    ):
        watch = TrainingWatch(context, prepared, trackers, log, name)
        result = train(job, watch.step, context.stop_if_asked, watch.note)
        for tracker, problem in trackers.failures.items():
            context.say(f"Logging to {tracker} failed: {problem}", level="warning")
        return result, best_adapter(job)


def _export(store: Store, prepared: Prepared, name: str, best_folder: Path) -> dict[str, Artifact]:
    artifacts: dict[str, Artifact] = {}
    if (best_folder / "adapter_config.json").is_file():
        artifacts["adapter"] = store.models.add_artifact(name, "adapter", lambda folder: _copy(best_folder, folder))
        adapter_folder = store.models.artifact_folder(artifacts["adapter"])
        merged = store.models.add_artifact(
            name, "merged", lambda folder: save_merged(prepared.base_folder, adapter_folder, folder)
        )
    else:
        merged = store.models.add_artifact(
            name, "merged", lambda folder: save_whole(prepared.base_folder, best_folder, folder)
        )
    artifacts["merged"] = merged
    if product(prepared.request.options.method) == "generator":
        artifacts[SERVED_FORM] = make_gguf(store, name, SERVED_FORM, store.models.artifact_folder(merged))
    return artifacts


def _copy(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def _parity(context: RunContext, prepared: Prepared, name: str, artifacts: dict[str, Artifact]) -> Parity | None:
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
    prepared: Prepared,
    made: TrainingPlan,
    name: str,
    result: TrainingResult,
    artifacts: dict[str, Artifact],
    parity: Parity | None,
) -> TunedModel:
    return TunedModel(
        name=name,
        project=context.run.project,
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
        parent=str(prepared.request.adapter or prepared.request.base) if prepared.start_adapter else None,
        product=product(prepared.request.options.method),
        labels=prepared.labels,
        created_at=datetime.now(UTC),
    )
