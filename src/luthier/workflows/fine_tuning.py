"""Runs as OpenAI's clients see them: training runs as fine-tuning jobs, their events, and checkpoints. Only looks."""

from __future__ import annotations

import math
from typing import Any, Literal

from luthier.errors import NotFoundError
from luthier.records.fine_tuning import Checkpoint
from luthier.records.run import Run, RunEvent
from luthier.records.training import AUTO, TrainingConfig, TrainingPlan
from luthier.settings import load_settings
from luthier.store.store import Store
from luthier.workflows.material import TrainRequest
from luthier.workflows.step_metrics import openai_metrics, read_plan

JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
RUN, JOB, EVENT = "train-", "ftjob-", "ftevent-"
VALIDATING = "validate files"
LEVELS = {"info": "info", "warning": "warn", "error": "error"}
# What OpenAI says where a stage of ours begins.
STAGES = {
    VALIDATING: "Validating the job's files",
    "plan": "Planning the job",
    "train": "Fine-tuning job started",
    "export": "Making the model's forms",
    "parity": "Proving that the model's forms agree",
}


def job_id(run_id: str) -> str:
    """Return the id of a run as a job."""
    return JOB + run_id.removeprefix(RUN)


def run_id_of(job: str) -> str:
    """Return the id of a job's run.

    Raises:
        NotFoundError: it is not the id of a job.
    """
    if not job.startswith(JOB):
        raise NotFoundError(f"There is no fine-tuning job {job!r}.")
    return RUN + job.removeprefix(JOB)


def job_object(store: Store, run: Run) -> dict[str, Any]:
    """Return a run as ``fine_tuning.job``. A paused one has the status ``queued``, for OpenAI's has no better."""
    request = TrainRequest.model_validate(run.config)
    options = request.options
    plan = read_plan(store.run_folder(run.id))
    hyperparameters = _hyperparameters(options, plan)
    result = run.result or {}
    return {
        "id": job_id(run.id),
        "object": "fine_tuning.job",
        "created_at": int(run.created_at.timestamp()),
        "finished_at": int(run.finished_at.timestamp()) if run.finished_at else None,
        "model": request.base,
        "fine_tuned_model": result.get("model"),
        "organization_id": load_settings().organisation,
        "result_files": result.get("result_files", []),
        "status": _status(store, run),
        "training_file": request.files.training if request.files else request.dataset,
        "validation_file": request.files.validation if request.files else None,
        "hyperparameters": hyperparameters,
        "trained_tokens": result.get("trained_tokens"),
        "error": _error(store, run, request),
        "seed": options.seed,
        "estimated_finish": _estimated_finish(store, run, plan),
        "integrations": _integrations(options),
        "method": _method(options, plan, hyperparameters),
        "metadata": run.metadata,
        "user_provided_suffix": request.suffix or None,
        "x_paused": run.status == "paused",
        "x_run_id": run.id,
    }


def event_object(event: RunEvent) -> dict[str, Any]:
    """Return a run's event as ``fine_tuning.job.event``."""
    metrics = event.type == "metrics"
    return {
        "id": event_id(event),
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at.timestamp()),
        "level": LEVELS[event.level],
        "message": _message(event),
        "type": "metrics" if metrics else "message",
        "data": openai_metrics(event.data) if metrics else {},
    }


def event_id(event: RunEvent) -> str:
    """Return an event's id, which says where the next page begins."""
    return f"{EVENT}{event.run_id.removeprefix(RUN)}-{event.sequence}"


def sequence_of(job: str, event: str) -> int:
    """Return the place of an event within its job.

    Raises:
        NotFoundError: it is not the id of an event of this job.
    """
    prefix = f"{EVENT}{job.removeprefix(JOB)}-"
    number = event.removeprefix(prefix)
    if not event.startswith(prefix) or not (number.isascii() and number.isdecimal() and len(number) < 18):
        raise NotFoundError(f"The job {job!r} has no event {event!r}.")
    return int(number)


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint as ``fine_tuning.job.checkpoint``."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": job_id(checkpoint.parent),
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
    }


def _status(store: Store, run: Run) -> JobStatus:
    if run.status == "paused":
        return "queued"
    if run.status == "running" and _open_stage(store, run) == VALIDATING:
        return "validating_files"
    return run.status


def _open_stage(store: Store, run: Run) -> str | None:
    """Return the stage that began last and has not ended."""
    event = store.runs.last_event(run.id, "stage")
    return event.data["stage"] if event and "seconds" not in event.data else None


def _hyperparameters(options: TrainingConfig, plan: TrainingPlan | None) -> dict[str, Any]:
    """Return what the run uses, once it is planned, and what it was asked for before."""
    multiplier = options.learning_rate_multiplier
    if plan is None:
        epochs: float | str = options.epochs
        batch_size: int | str = options.batch_size
    else:
        epochs, batch_size = plan.resolved.epochs, plan.resolved.batch_size
    if epochs != AUTO:
        # Runs of the command line may have parts of an epoch, which OpenAI's clients cannot read.
        epochs = max(1, round(float(epochs)))
    return {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": multiplier}


def _method(
    options: TrainingConfig, plan: TrainingPlan | None, hyperparameters: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the method with its hyperparameters; None for methods that OpenAI's clients do not know."""
    if options.method == "supervised":
        return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    if options.method == "dpo":
        return {"type": "dpo", "dpo": {"hyperparameters": {**hyperparameters, "beta": options.dpo.beta}}}
    return None


def _error(store: Store, run: Run, request: TrainRequest) -> dict[str, Any] | None:
    if run.status != "failed":
        return None
    message = run.error or "The run failed."
    if _open_stage(store, run) != VALIDATING:
        return {"code": "run_failed", "message": message, "param": None}
    held_out = request.files.validation if request.files else None
    param = "validation_file" if held_out and held_out in message else "training_file"
    return {"code": f"invalid_{param}", "message": message, "param": param}


def _estimated_finish(store: Store, run: Run, plan: TrainingPlan | None) -> int | None:
    if run.status != "running" or plan is None or run.started_at is None:
        return None
    last = store.runs.last_event(run.id, "metrics")
    if last is None:
        return int(run.started_at.timestamp() + plan.seconds)
    left = last.data.get("seconds_left")
    return int(last.created_at.timestamp() + left) if isinstance(left, int | float) and math.isfinite(left) else None


def _integrations(options: TrainingConfig) -> list[dict[str, Any]]:
    asked = options.wandb
    if "wandb" not in options.trackers or asked.project is None:
        return []
    wandb = {"project": asked.project, "name": asked.name, "entity": asked.entity, "tags": list(asked.tags)}
    return [{"type": "wandb", "wandb": wandb}]


def _message(event: RunEvent) -> str:
    if event.type == "stage" and "seconds" not in event.data:
        return STAGES.get(event.message, event.message)
    if event.type == "progress":
        return f"{event.message}: {event.data.get('done')}/{event.data.get('total')}"
    return event.message
