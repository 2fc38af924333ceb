"""The training loop: any objective, any mode, on one machine.

A step takes a batch of units (examples or pairs), asks the objective for their loss in parts, and goes backward through
each, so that the gradient is that of the whole batch however it was cut. Everything that changes from step to step is
in :class:`_Progress`, the optimizer and the random state, and all of that is in a checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.errors import DivergedError
from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.row_model import RowModel
from luthier.records.training import StepMetrics, TrainingPlan, TrainingResult
from luthier.templates.renderer import Unit, tokens_of
from luthier.templates.spool import Joined
from luthier.train.engine.allocator import freed_memory_kept
from luthier.train.engine.checkpoint import (
    best_folder,
    check_checkpoint,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
    save_epoch,
)
from luthier.train.engine.objectives.choice import make_objective
from luthier.train.engine.objectives.objective import Objective
from luthier.train.engine.optimizers import make_optimizer, parameter_groups
from luthier.train.engine.order import Order
from luthier.train.engine.samples import answer_samples
from luthier.train.engine.trainable import load_trainable
from luthier.train.notes import Note, PreparationNote, SampleNote, SavedNote, WarningNote, WeightsNote
from luthier.train.plan import out_of_memory
from luthier.train.schedule import rate_factor
from luthier.train.watch import LossHistory

LEFT_OUT_IN_A_ROW = 3  # so many steps without finite numbers end a run: one may be a broken example's fault
CHECKPOINT_SECONDS = 600.0
NO_MEMORY = re.compile("out of memory|not enough memory|allocate memory", re.IGNORECASE)  # as torch's allocators say it

OnStep = Callable[[StepMetrics], None]
OnNote = Callable[[Note], None]


@dataclass(frozen=True)
class TrainingJob:
    """What to train on what, where.

    ``examples``, ``validation`` and ``test`` are of the kind that the plan's method learns from; the last is measured
    once, at the end, on the best weights. ``base_name`` is written into the adapter; ``folder`` takes checkpoints and
    ends with the best step's adapter (or model) in its ``best`` folder. ``labels`` are a classifier's classes;
    ``start_adapter`` is one to go on from; ``sample_prompts`` (tokens) are answered at each validation, up to
    ``sample_tokens`` tokens or one of ``stop_tokens``. With ``epoch_weights`` the weights are also validated and
    written at the end of each pass over the examples, with a :class:`~luthier.train.notes.WeightsNote`. The state is
    saved at the plan's steps, and wherever ``checkpoint_seconds`` have passed (None: never, for steps that are only
    measured). ``base_sha256`` names the base's weights, which a run that goes on must find unchanged (None: their files
    are hashed).
    """

    plan: TrainingPlan
    examples: Sequence[Unit]
    validation: Sequence[Unit]
    base_folder: Path
    base_name: str
    folder: Path
    test: Sequence[Unit] = ()
    labels: tuple[str, ...] = ()
    start_adapter: Path | None = None
    sample_prompts: tuple[tuple[int, ...], ...] = ()
    sample_tokens: int = 24
    stop_tokens: frozenset[int] = frozenset()
    epoch_weights: bool = False
    checkpoint_seconds: float | None = CHECKPOINT_SECONDS
    base_sha256: str | None = None


@dataclass
class _Progress:
    """What changes from step to step and is saved with a checkpoint."""

    fingerprint: str
    history: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0  # without validations and samples
    trained_tokens: int = 0
    left_out: int = 0
    left_out_in_a_row: int = 0
    train_loss: float = math.nan
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    stopped_early: str | None = None


@dataclass(frozen=True)
class _BatchOutcome:
    loss: float
    metrics: dict[str, float]
    tokens: int


@dataclass
class _Training:
    """The parts of a run that work together."""

    job: TrainingJob
    model: RowModel | EncoderModel
    objective: Objective[Any]
    optimizer: torch.optim.Optimizer
    progress: _Progress
    history: LossHistory
    saved_at: float = field(default_factory=time.monotonic)


@freed_memory_kept()
def train(
    job: TrainingJob, on_step: OnStep, stop_if_asked: Callable[[], None], on_note: OnNote = lambda note: None
) -> TrainingResult:
    """Train, from the latest checkpoint where there is one, and leave the best adapter in ``job.folder / "best"``.

    ``on_step`` hears of every optimizer step, ``on_note`` of warnings, sample answers and preparations.
    ``stop_if_asked`` is called after each step, where the state is saved first if it raises, and during preparations.
    A step whose loss or gradient is not finite changes nothing: it is left out.

    Raises:
        DivergedError: several steps in a row had to be left out; the last good state is saved.
        CapacityError: a step found no memory; the hint says what to lower.
        ConflictError: the checkpoint in the folder belongs to another job.
        InputError: the adapter to go on from does not fit the base.
    """
    with _memory_named(job.plan):
        return _train(job, on_step, stop_if_asked, on_note)


@contextmanager
def _memory_named(plan: TrainingPlan) -> Iterator[None]:
    """Say of what finds no memory what was tried, and what would fit."""
    try:
        yield
    except MemoryError as error:
        raise out_of_memory(plan, str(error) or "the system gave none") from error
    except RuntimeError as error:  # torch has an error of its own for a GPU, and none for the processor's memory
        if not NO_MEMORY.search(str(error)):
            raise
        raise out_of_memory(plan, str(error).splitlines()[0]) from error


def _train(job: TrainingJob, on_step: OnStep, stop_if_asked: Callable[[], None], on_note: OnNote) -> TrainingResult:
    run = _start(job, on_note, stop_if_asked)
    order = Order(len(job.examples), job.plan.resolved)
    while run.progress.step < job.plan.steps and run.progress.stopped_early is None:
        started = time.monotonic()
        outcome = _train_step(run, order.batch(run.progress.step))
        took = time.monotonic() - started
        valid = _validate_if_due(run, on_note)
        run.progress.training_seconds += took
        run.progress.seconds += time.monotonic() - started
        metrics = _metrics(run, outcome, valid, took)
        on_step(metrics)
        if _ends_epoch(run):
            folder = save_epoch(job.folder, run.model.model, job.base_name)
            on_note(WeightsNote(metrics=metrics, folder=folder))
        for warning in run.history.warnings():
            on_note(WarningNote(warning=warning))
        run.progress.history = run.history.state()
        if _save_and_stop(run, stop_if_asked):
            on_note(SavedNote(step=run.progress.step))
    return _result(run.progress, _test(run))


def best_adapter(job: TrainingJob) -> Path:
    """Return the folder of the adapter (or model) that training left as the best."""
    return best_folder(job.folder)


def _start(job: TrainingJob, on_note: OnNote, stop_if_asked: Callable[[], None]) -> _Training:
    resolved, fingerprint = job.plan.resolved, _fingerprint(job)
    check_checkpoint(job.folder, fingerprint)
    model = load_trainable(job.base_folder, resolved, job.labels, job.start_adapter)
    objective = make_objective(model, job.plan)

    def on_progress(what: str, share: float) -> None:
        on_note(PreparationNote(what=what, share=share))
        stop_if_asked()

    objective.prepare(_all_units(job), job.folder, fingerprint, on_progress)
    groups = parameter_groups(model.model, resolved.learning_rate, resolved.weight_decay, resolved.layer_decay)
    optimizer = make_optimizer(resolved.optimizer, groups)
    progress = _Progress(fingerprint, LossHistory(job.plan.steps).state())
    saved = load_checkpoint(job.folder, model.model, optimizer, fingerprint)
    if saved:
        progress = _Progress(**saved)
    return _Training(job, model, objective, optimizer, progress, LossHistory.from_state(progress.history))


def _train_step(run: _Training, batch: list[int]) -> _BatchOutcome:
    resolved, progress = run.job.plan.resolved, run.progress
    factor = rate_factor(progress.step, run.job.plan.steps, resolved)
    for group in run.optimizer.param_groups:
        group["lr"] = resolved.learning_rate * factor * group["scale"]
    run.model.model.train()
    outcome = _batch_loss(run, [run.job.examples[i] for i in batch], training=True)
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, resolved.max_gradient_norm))
    for group in run.optimizer.param_groups:
        group["gradient_norm"] = norm
    progress.step += 1
    progress.trained_tokens += outcome.tokens
    if math.isfinite(outcome.loss) and math.isfinite(norm):
        run.optimizer.step()
        progress.train_loss = outcome.loss
        progress.left_out_in_a_row = 0
    else:
        progress.left_out += 1
        progress.left_out_in_a_row += 1
    run.optimizer.zero_grad(set_to_none=True)
    run.history.training(progress.step, outcome.loss, norm)
    return outcome


def _batch_loss(run: _Training, units: Sequence[Unit], *, training: bool) -> _BatchOutcome:
    """Return the loss and metrics of a batch; in training add its gradient."""
    loss = 0.0
    sums: dict[str, tuple[float, float]] = {}
    for part in run.objective.losses(units, training=training):
        found = part()
        if training:
            found.loss.backward()
        loss += float(found.loss.detach())
        for name, (value, weight) in found.sums.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + weight)
    metrics = {name: value / weight for name, (value, weight) in sums.items() if weight}
    return _BatchOutcome(loss, metrics, sum(tokens_of(unit) for unit in units))


def _validate_if_due(run: _Training, on_note: OnNote) -> _BatchOutcome | None:
    progress, job = run.progress, run.job
    due = progress.step % job.plan.resolved.validate_every == 0 or progress.step == job.plan.steps
    due = due or _ends_epoch(run)
    if not due or not job.validation:
        return None
    run.model.model.eval()
    with torch.no_grad():
        outcome = _batch_loss(run, job.validation, training=False)
        if job.sample_prompts and isinstance(run.model, RowModel):
            answers = answer_samples(run.model, job.sample_prompts, job.stop_tokens, job.sample_tokens)
            on_note(SampleNote(step=progress.step, answers=answers))
    progress.valid_loss = outcome.loss
    run.history.validation(progress.step, outcome.loss)
    if job.plan.resolved.early_stopping and progress.step < job.plan.steps:
        progress.stopped_early = run.history.should_stop(job.plan.resolved.early_stopping)
    if math.isfinite(outcome.loss) and (progress.best_valid_loss is None or outcome.loss < progress.best_valid_loss):
        save_best(job.folder, run.model.model, job.base_name)
        progress.best_valid_loss, progress.best_step = outcome.loss, progress.step
        progress.best_metrics = outcome.metrics
    return outcome


def _ends_epoch(run: _Training) -> bool:
    """Return whether this step is the last one, or ends a pass, and the weights of such steps are wanted."""
    job, step = run.job, run.progress.step
    passes, before = (done * job.plan.resolved.batch_size // len(job.examples) for done in (step, step - 1))
    last = step == job.plan.steps or run.progress.stopped_early is not None
    return job.epoch_weights and (last or passes > before)


def _test(run: _Training) -> dict[str, float]:
    """Return loss and metrics of the best weights on the test units."""
    if not run.job.test:
        return {}
    load_best(run.job.folder, run.model.model)
    run.model.model.eval()
    with torch.no_grad():
        outcome = _batch_loss(run, run.job.test, training=False)
    return {"loss": outcome.loss, **outcome.metrics}


def _save_and_stop(run: _Training, stop_if_asked: Callable[[], None]) -> bool:
    """Save the checkpoint that is due at this step, and also where the run must stop; return whether it was saved."""
    progress, job = run.progress, run.job
    last = progress.step == job.plan.steps or progress.stopped_early is not None
    if progress.left_out_in_a_row == LEFT_OUT_IN_A_ROW or (last and progress.left_out == progress.step):
        _end_diverged(run)
    if last and progress.best_step == 0:  # nothing was held out to choose by
        save_best(job.folder, run.model.model, job.base_name)
        progress.best_step = progress.step
    try:
        stop_if_asked()
    except BaseException:
        _save(run)
        raise
    waited = job.checkpoint_seconds is not None and time.monotonic() - run.saved_at >= job.checkpoint_seconds
    return (last or waited or progress.step % job.plan.resolved.checkpoint_every == 0) and _save(run)


def _save(run: _Training) -> bool:
    """Save the state of a run, if it is a good one: weights that broke must not take the place of those before."""
    parameters = (parameter for group in run.optimizer.param_groups for parameter in group["params"])
    if run.job.checkpoint_seconds is None or not all(bool(parameter.isfinite().all()) for parameter in parameters):
        return False
    save_checkpoint(run.job.folder, run.model.model, run.optimizer, vars(run.progress))
    run.saved_at = time.monotonic()
    return True


def _end_diverged(run: _Training) -> None:
    count = run.progress.left_out_in_a_row
    run.progress.left_out_in_a_row = 0  # a run that goes on looks at the steps behind these
    _save(run)
    steps = "1 step" if count == 1 else f"{count} steps in a row"
    raise DivergedError(
        f"{steps}, up to step {run.progress.step}, had a loss or a gradient that is not finite: "
        "training diverged. What was learned before is kept.",
        hint="start again with learning_rate_multiplier=0.3 or precision=float32, or look for broken examples; a run "
        "that is resumed goes on behind these steps",
    )


def _metrics(run: _Training, outcome: _BatchOutcome, valid: _BatchOutcome | None, seconds: float) -> StepMetrics:
    group, progress, plan = run.optimizer.param_groups[0], run.progress, run.job.plan
    return StepMetrics(
        step=progress.step,
        steps=plan.steps,
        epoch=progress.step * plan.resolved.batch_size / len(run.job.examples),
        train_loss=_finite(outcome.loss),
        train_metrics=_all_finite(outcome.metrics),
        valid_loss=_finite(valid.loss) if valid else None,
        valid_metrics=_all_finite(valid.metrics) if valid else {},
        learning_rate=group["lr"],
        gradient_norm=_finite(group["gradient_norm"]),
        tokens_per_second=outcome.tokens / seconds,
        seconds_left=progress.seconds / progress.step * (plan.steps - progress.step),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _all_finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _result(progress: _Progress, test_metrics: dict[str, float]) -> TrainingResult:
    return TrainingResult(
        steps=progress.step,
        best_step=progress.best_step,
        train_loss=progress.train_loss,
        valid_loss=progress.valid_loss,
        best_valid_loss=progress.best_valid_loss,
        valid_metrics=progress.best_metrics,
        test_metrics=test_metrics,
        stopped_early=progress.stopped_early,
        left_out_steps=progress.left_out,
        trained_tokens=progress.trained_tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.trained_tokens / max(progress.training_seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(),
    )


def peak_memory_bytes() -> int:
    """Return the most memory that this process held, on the GPU where there is one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak


def _all_units(job: TrainingJob) -> Sequence[Unit]:
    return Joined(job.examples, job.validation, job.test)  # they may lie on disk: never all of them in a list


def _fingerprint(job: TrainingJob) -> str:
    """Return a hash of everything that a checkpoint depends on: options, examples, and the weights it starts from."""
    # Without what is usual: an option that is new since a run began does not keep it from going on.
    digest = hashlib.sha256(job.plan.resolved.model_dump_json(exclude_defaults=True).encode())
    base = job.base_sha256 or _hash_of_weights(job.base_folder)
    start = _hash_of_weights(job.start_adapter) if job.start_adapter else None
    digest.update(repr((job.base_name, base, job.labels, start)).encode())
    for unit in _all_units(job):
        digest.update(repr(unit).encode())
    return digest.hexdigest()


def _hash_of_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
