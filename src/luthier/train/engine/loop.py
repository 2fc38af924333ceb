"""The training loop: supervised LoRA on one machine.

Examples come in rows that share their prefix (:mod:`luthier.llm.engine.prefix_attention`); the loss of an optimizer
step is the mean over all its loss tokens however they were packed, so that it is that of the batch as a whole.
"""

from __future__ import annotations

import hashlib
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from luthier.errors import EngineError
from luthier.llm.engine.row_forward import autocast, target_logits
from luthier.llm.engine.torch_model import DTYPES, load_base
from luthier.llm.rows import pack
from luthier.records.training import Resolved, StepMetrics, TrainingPlan, TrainingResult
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.checkpoint import BEST, load_checkpoint, save_best, save_checkpoint

OnStep = Callable[[StepMetrics], None]


@dataclass(frozen=True)
class TrainingJob:
    """What to train on what, where.

    ``base_name`` is written into the adapter; ``folder`` takes checkpoints and ends with the adapter of the best
    step in its ``best`` folder.
    """

    plan: TrainingPlan
    examples: Sequence[TokenizedExample]
    validation: Sequence[TokenizedExample]
    base_folder: Path
    base_name: str
    folder: Path


@dataclass
class _Progress:
    """What changes from step to step and is saved with a checkpoint."""

    fingerprint: str
    step: int = 0
    seconds: float = 0.0
    trained_tokens: int = 0
    train_loss: float = math.nan
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int = 0


@dataclass(frozen=True)
class _BatchOutcome:
    loss: float
    accuracy: float
    tokens: int


def train(job: TrainingJob, on_step: OnStep, stop_if_asked: Callable[[], None]) -> TrainingResult:
    """Train, from the latest checkpoint where there is one, and leave the best adapter in ``job.folder / "best"``.

    ``on_step`` hears of every optimizer step. ``stop_if_asked`` is called after each; where it raises, the state is
    saved first.

    Raises:
        EngineError: the loss is no longer a finite number.
        ConflictError: the checkpoint in the folder belongs to another job.
    """
    resolved = job.plan.resolved
    model = _with_adapter(job)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=resolved.learning_rate,
        weight_decay=resolved.weight_decay,
    )
    progress = _Progress(_fingerprint(job))
    saved = load_checkpoint(job.folder, model, optimizer, progress.fingerprint)
    if saved:
        progress = _Progress(**saved)
    order = _Order(len(job.examples), resolved)
    while progress.step < job.plan.steps:
        started = time.monotonic()
        outcome = _train_step(job, model, optimizer, order.batch(progress.step), progress.step)
        progress.step += 1
        progress.train_loss = outcome.loss
        progress.trained_tokens += outcome.tokens
        valid = _validate_if_due(job, model, progress)
        progress.seconds += time.monotonic() - started
        on_step(_metrics(job, outcome, valid, progress, optimizer, time.monotonic() - started))
        _save_and_stop(job, model, optimizer, progress, stop_if_asked)
    return _result(progress)


def _with_adapter(job: TrainingJob) -> Any:
    resolved = job.plan.resolved
    torch.manual_seed(resolved.seed)
    base = load_base(job.base_folder, resolved.precision)
    config = LoraConfig(
        r=resolved.lora_rank,
        lora_alpha=resolved.lora_alpha,
        lora_dropout=resolved.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)  # PEFT keeps the adapter in float32 over a bfloat16 base
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast takes bfloat16 inputs as they are; no detour by float32
    return model


class _Order:
    """The order of the examples: every pass a new permutation that depends on the seed and the pass alone."""

    def __init__(self, examples: int, resolved: Resolved) -> None:
        self._examples = examples
        self._batch_size = resolved.batch_size
        self._seed = resolved.seed
        self._total = math.ceil(examples * resolved.epochs)
        self._permutations: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[int]:
        """Return the indices of the examples of a step; a batch may span two passes."""
        first = step * self._batch_size
        last = min(first + self._batch_size, max(self._total, first + 1))
        return [self._permutation(visit // self._examples)[visit % self._examples] for visit in range(first, last)]

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(self._examples, generator=generator).tolist()
            # A batch may span two passes; older ones are not asked for again.
            self._permutations = {k: v for k, v in self._permutations.items() if k == epoch - 1} | {epoch: order}
        return self._permutations[epoch]


def _train_step(
    job: TrainingJob, model: Any, optimizer: torch.optim.Optimizer, batch: list[int], step: int
) -> _BatchOutcome:
    resolved = job.plan.resolved
    rate = resolved.learning_rate * _schedule(step, job.plan.steps, resolved)
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    outcome = _batch_loss(job, model, [job.examples[i] for i in batch], backward=True)
    if not math.isfinite(outcome.loss):
        raise EngineError(
            f"The loss is {outcome.loss} at step {step + 1}: training diverged.",
            hint="lower learning_rate_multiplier to 0.3, or look for broken examples",
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, resolved.max_gradient_norm)
    for group in optimizer.param_groups:
        group["gradient_norm"] = float(norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outcome


def _schedule(step: int, steps: int, resolved: Resolved) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then the schedule down to a tenth of a percent."""
    if step < resolved.warmup_steps:
        return (step + 1) / resolved.warmup_steps
    if resolved.schedule == "constant":
        return 1.0
    done = (step - resolved.warmup_steps) / max(1, steps - resolved.warmup_steps)
    factor = 1 - done if resolved.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return max(1e-3, factor)


def _batch_loss(job: TrainingJob, model: Any, examples: Sequence[TokenizedExample], *, backward: bool) -> _BatchOutcome:
    """Return the weighted mean loss over all target tokens of a batch; with ``backward`` add its gradient."""
    dtype = DTYPES[job.plan.resolved.precision]
    rows = pack(examples, job.plan.shared_prefix, job.plan.resolved.tokens_per_row)
    total_weight = sum(sum(row.weights) for row in rows)
    loss_sum, right, count = 0.0, 0, 0
    for row in rows:
        with autocast(dtype, model.device):
            logits_MV, targets_M = target_logits(model, row, dtype)
            weights_M = torch.tensor(row.weights, device=logits_MV.device)
            losses_M = torch.nn.functional.cross_entropy(logits_MV, targets_M, reduction="none")
            loss = (losses_M * weights_M).sum() / total_weight
        if backward:
            loss.backward()
        loss_sum += loss.item()
        right += int((logits_MV.detach().argmax(dim=-1) == targets_M).sum())
        count += len(row.targets)
    return _BatchOutcome(loss_sum, right / count, sum(len(example.tokens) for example in examples))


def _validate_if_due(job: TrainingJob, model: Any, progress: _Progress) -> _BatchOutcome | None:
    due = progress.step % job.plan.resolved.validate_every == 0 or progress.step == job.plan.steps
    if not due or not job.validation:
        return None
    model.eval()
    with torch.inference_mode():
        outcome = _batch_loss(job, model, job.validation, backward=False)
    progress.valid_loss = outcome.loss
    return outcome


def _save_and_stop(
    job: TrainingJob,
    model: Any,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
    stop_if_asked: Callable[[], None],
) -> None:
    """Save what is due at this step: the best adapter, the checkpoint; save the state too where the run must stop."""
    last = progress.step == job.plan.steps
    fresh = progress.step % job.plan.resolved.validate_every == 0 or last
    better = progress.best_valid_loss is None or (progress.valid_loss or math.inf) < progress.best_valid_loss
    if (fresh and job.validation and better) or (last and not job.validation):
        save_best(job.folder, model, job.base_name)
        progress.best_valid_loss, progress.best_step = progress.valid_loss, progress.step
    try:
        stop_if_asked()
    except BaseException:
        save_checkpoint(job.folder, model, optimizer, vars(progress))
        raise
    if last or progress.step % job.plan.resolved.checkpoint_every == 0:
        save_checkpoint(job.folder, model, optimizer, vars(progress))


def _metrics(
    job: TrainingJob,
    outcome: _BatchOutcome,
    valid: _BatchOutcome | None,
    progress: _Progress,
    optimizer: torch.optim.Optimizer,
    seconds: float,
) -> StepMetrics:
    group = optimizer.param_groups[0]
    return StepMetrics(
        step=progress.step,
        steps=job.plan.steps,
        epoch=progress.step * job.plan.resolved.batch_size / len(job.examples),
        train_loss=outcome.loss,
        train_token_accuracy=outcome.accuracy,
        valid_loss=valid.loss if valid else None,
        valid_token_accuracy=valid.accuracy if valid else None,
        learning_rate=group["lr"],
        gradient_norm=group["gradient_norm"],
        tokens_per_second=outcome.tokens / seconds,
        seconds_left=progress.seconds / progress.step * (job.plan.steps - progress.step),
    )


def _result(progress: _Progress) -> TrainingResult:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return TrainingResult(
        steps=progress.step,
        best_step=progress.best_step,
        train_loss=progress.train_loss,
        valid_loss=progress.valid_loss,
        best_valid_loss=progress.best_valid_loss,
        trained_tokens=progress.trained_tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.trained_tokens / max(progress.seconds, 1e-9),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
    )


def _fingerprint(job: TrainingJob) -> str:
    """Return a hash of everything that a checkpoint depends on: options, examples, and the base's name."""
    digest = hashlib.sha256(job.plan.resolved.model_dump_json().encode() + job.base_name.encode())
    for example in (*job.examples, *job.validation):
        digest.update(repr((example.tokens, example.loss_mask, example.weight)).encode())
    return digest.hexdigest()


def best_adapter(job: TrainingJob) -> Path:
    """Return the folder of the adapter that training left as the best."""
    return job.folder / BEST
