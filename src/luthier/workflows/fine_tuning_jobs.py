"""Fine-tuning jobs as OpenAI's clients handle them: create, find, cancel, pause, resume."""

from __future__ import annotations

import importlib.util
from itertools import islice
from typing import Any

from luthier.errors import ConflictError, InputError, NotFoundError
from luthier.ingest.training_rows import read_training_rows
from luthier.jobs.launch import submit
from luthier.records.dataset import BadRow
from luthier.records.fine_tuning import Checkpoint, Hyperparameters, JobRequest, TrainingFiles
from luthier.records.model import check_suffix
from luthier.records.objectives import PAIRED
from luthier.records.run import RESUMABLE, Run, RunEvent, RunKind, RunRequest
from luthier.records.stored import Page
from luthier.records.training import AUTO, TrainingConfig
from luthier.serve.api_error import ApiError, model_not_found
from luthier.settings import load_settings
from luthier.store.store import Store
from luthier.workflows.checkpoints import is_checkpoint
from luthier.workflows.files import file_for, file_path
from luthier.workflows.fine_tuning import job_id, run_id_of, sequence_of
from luthier.workflows.material import TrainRequest
from luthier.workflows.models import decoder, model_named

KINDS: tuple[RunKind, ...] = ("train",)
LEAST_EXAMPLES = 2
ASKED = {"pause": "pause", "cancel": "stop for good"}


def create_job(store: Store, project: str, asked: JobRequest) -> Run:
    """Put a fine-tuning job into the queue.

    Raises:
        ApiError: 404 where the model or a file is not there, 400 where one does not fit or an option is not supported;
            each names the field.
    """
    options = _options(asked)
    base = _base(store, project, asked.model)
    pairs = options.method in PAIRED
    _check_file(store, project, asked.training_file, "training_file", least=LEAST_EXAMPLES, pairs=pairs)
    if asked.validation_file is not None:
        _check_file(store, project, asked.validation_file, "validation_file", least=1, pairs=pairs)
    if asked.suffix is not None:
        try:
            check_suffix(asked.suffix)
        except InputError as error:
            raise ApiError(400, error.message, param="suffix", code="invalid_value") from error
    request = TrainRequest(
        base=base,
        files=TrainingFiles(training=asked.training_file, validation=asked.validation_file),
        suffix=asked.suffix or "",
        options=options,
    )
    run = submit(store, "train", request, project=project, metadata=asked.metadata)
    store.runs.add_event(run.id, f"Created fine-tuning job: {job_id(run.id)}")
    if asked.validation_file == asked.training_file:
        same = "validation_file is training_file: its loss will say how much was learned by heart, and nothing more"
        store.runs.add_event(run.id, same, level="warning")
    return run


def find_job(store: Store, project: str, job: str) -> Run:
    """Return the run of a project's job.

    Raises:
        NotFoundError: the project has no such job.
    """
    missing = NotFoundError(f"There is no fine-tuning job {job!r}.")
    try:
        run = store.runs.get(run_id_of(job), project=project)
    except NotFoundError:
        raise missing from None
    if run.kind not in KINDS:
        raise missing
    return run


def list_jobs(store: Store, project: str, after: str | None, limit: int, metadata: dict[str, str] | None) -> Page[Run]:
    """Return a part of a project's jobs, the newest first; ``metadata`` None means those without any.

    Raises:
        NotFoundError: the project has no job ``after``.
    """
    last = find_job(store, project, after).id if after is not None else None
    return store.runs.page(project, KINDS, after=last, limit=limit, metadata=metadata, no_metadata=metadata is None)


def stop_job(store: Store, project: str, job: str, request: RunRequest) -> Run:
    """Ask a job to pause or to stop for good: at once where nothing runs it, else at its next step.

    Raises:
        NotFoundError: the project has no such job.
        ConflictError: it has ended, or is paused already.
    """
    run = find_job(store, project, job)
    if run.is_finished or (request, run.status) == ("pause", "paused"):
        raise ConflictError(f"The job {job} has {'been paused' if run.status == 'paused' else run.status} already.")
    asked = store.runs.request(run.id, request)
    store.runs.add_event(run.id, f"The job was asked to {ASKED[request]}")
    return asked


def resume_job(store: Store, project: str, job: str) -> Run:
    """Put a paused or failed job back into the queue; it goes on from its last checkpoint.

    Raises:
        NotFoundError: the project has no such job.
        ConflictError: it has neither been paused nor failed.
    """
    run = find_job(store, project, job)
    if run.status not in RESUMABLE:
        stopping = ", and has not yet come to where it pauses" if run.request == "pause" else ""
        raise ConflictError(f"The job {job} is {run.status}{stopping}; only a paused or failed one can be resumed.")
    resumed = store.runs.requeue(run.id)
    store.runs.add_event(run.id, "The job was resumed")
    return resumed


def job_events(store: Store, project: str, job: str, after: str | None, limit: int) -> Page[RunEvent]:
    """Return a part of a job's events, the newest first.

    Raises:
        NotFoundError: the project has no such job, or the job no event ``after``.
    """
    run = find_job(store, project, job)
    before = sequence_of(job, after) if after is not None else None
    return store.runs.newest_events(run.id, before=before, limit=limit)


def job_checkpoints(store: Store, project: str, job: str, after: str | None, limit: int) -> Page[Checkpoint]:
    """Return a part of a job's checkpoints, the newest first.

    Raises:
        NotFoundError: the project has no such job, or no checkpoint ``after``.
    """
    run = find_job(store, project, job)
    return store.checkpoints.page(project, parent=run.id, after=after, limit=limit)


def _base(store: Store, project: str, name: str) -> str:
    """Return the base or tuned model that a client names to start from."""
    try:
        found = model_named(store, project, name, load_settings().stand_ins)
        if is_checkpoint(found):
            raise InputError(f"Training cannot start from the checkpoint {found!r}; name its job's model.")
        if not found.startswith("ft:"):
            return decoder(store, found).id
        tuned = store.models.get(found, project=project)
    except NotFoundError as error:
        raise model_not_found(str(error)) from error
    except InputError as error:
        raise ApiError(400, str(error), param="model", code="invalid_model") from error
    if tuned.product != "generator" or "adapter" not in tuned.artifacts:
        whole = "was trained whole and has no adapter to go on from"
        why = whole if tuned.product == "generator" else f"is a {tuned.product} and writes no answers"
        message = f"Training cannot start from {tuned.name!r}: it {why}."
        raise ApiError(400, message, param="model", code="invalid_model")
    return tuned.name


def _check_file(store: Store, project: str, id: str, param: str, *, least: int, pairs: bool) -> None:
    """Refuse a file that is not there, not meant for this, known to be wrong, too short, or of another form.

    The rows of a file that was found right on arrival have one form, so that the first ones tell.
    """
    file = file_for(store, project, id, "fine-tune", param)
    problem = file.status_details or "" if file.status == "error" else None
    if problem is None:
        first = list(islice(read_training_rows(file_path(store, project, id), pairs=pairs), least))
        wrong = next((row for row in first if isinstance(row, BadRow)), None)
        if wrong is not None:
            problem = f"line {wrong.line}: {wrong.reason}"
        elif len(first) < least:
            problem = f"It has {len(first)} example, and at least {least} are needed; 20 are sensible."
    if problem is not None:
        message = f"The file {id!r} ({file.filename}) cannot be learned from. {problem}".strip()
        raise ApiError(400, message, param=param, code="invalid_file")


def _options(asked: JobRequest) -> TrainingConfig:
    given, place = _hyperparameters(asked)
    method = asked.method.type if asked.method else "supervised"
    values: dict[str, Any] = {"method": method, "seed": asked.seed or 0}
    wanted = given.model_dump(exclude_none=True) if given else {}
    names = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate_multiplier"}
    for name, value in wanted.items():
        if name in names:
            values |= {names[name]: value} if value != AUTO else {}
        elif name == "beta" and method == "dpo":
            values |= {"dpo": {"beta": value}} if value != AUTO else {}
        else:
            raise _unsupported(f"{place}.{name}", f"The hyperparameter {name!r} is not supported by method {method!r}.")
    return TrainingConfig.model_validate(values | _tracking(asked))


def _hyperparameters(asked: JobRequest) -> tuple[Hyperparameters | None, str]:
    """Return the hyperparameters and where they stand."""
    if asked.method is None:
        return asked.hyperparameters, "hyperparameters"
    kind = asked.method.type
    if kind == "reinforcement":
        message = "The method 'reinforcement' is not supported here; supervised and dpo are."
        raise _unsupported("method.type", message)
    part = asked.method.supervised if kind == "supervised" else asked.method.dpo
    other = asked.method.dpo if kind == "supervised" else asked.method.supervised
    if other is not None:
        raise ApiError(400, f"The method is {kind!r}, and options of another are given.", param="method")
    inside = part.hyperparameters if part else None
    if inside is not None and asked.hyperparameters is not None:
        message = "Hyperparameters are given twice: leave those outside of method out."
        raise ApiError(400, message, param="hyperparameters", code="invalid_value")
    return (
        (inside, f"method.{kind}.hyperparameters") if inside is not None else (asked.hyperparameters, "hyperparameters")
    )


def _tracking(asked: JobRequest) -> dict[str, Any]:
    integrations = asked.integrations or []
    if not integrations:
        return {}
    if len(integrations) > 1:
        raise _unsupported("integrations", "Only one integration can be had for a job.")
    if importlib.util.find_spec("wandb") is None:
        message = "Logging to Weights & Biases needs a package that the service lacks: pip install wandb"
        raise _unsupported("integrations[0].type", message)
    wandb = integrations[0].wandb
    chosen = {"project": wandb.project, "name": wandb.name, "entity": wandb.entity, "tags": tuple(wandb.tags or ())}
    return {"trackers": ("wandb",), "wandb": chosen}


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")
