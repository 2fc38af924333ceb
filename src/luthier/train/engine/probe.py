"""Knowing before: makes steps at the longest length in a process of its own, and says what they took."""

from __future__ import annotations

import heapq
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from luthier.errors import CapacityError, RunStopped
from luthier.records.training import Derived, Measured, StepMetrics, TrainingPlan
from luthier.train.engine.loop import TrainingJob, peak_memory_bytes, train
from luthier.train.engine.objectives.objective import Unit, tokens_of
from luthier.train.plan import rows_of, with_measured

STEPS = 2  # the first one also pays for buffers and threads
HALVINGS = 8


def measured_plan(job: TrainingJob, on_attempt: Callable[[str], None] = lambda text: None) -> TrainingPlan:
    """Return the job's plan with the memory and time of steps that were really made at the longest length.

    Where they do not fit, rows are halved, then layers recomputed, and it is tried again.

    Raises:
        CapacityError: nothing fits; the hint says what to lower, and to what.
    """
    plan = job.plan
    for _ in range(HALVINGS):
        on_attempt(f"Trying steps of {plan.resolved.tokens_per_row:,} tokens")
        try:
            return with_measured(plan, measure_steps(replace(job, plan=plan)), job.validation)
        except CapacityError:
            smaller = _smaller(plan)
            if smaller is None:
                raise
            plan = smaller
    raise CapacityError("No step of this run fits into memory.", hint="take a smaller base model, or mode qlora")


def measure_steps(job: TrainingJob) -> Measured:
    """Make :data:`STEPS` steps on the longest units, in a process of its own.

    Raises:
        CapacityError: the process was killed, as by a system that is out of memory.
    """
    units = _longest(job.examples, job.plan)
    # Threads of a process that inherits this give way to others while they wait, as those of a run do.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        small = replace(
            job, examples=units, validation=(), test=(), folder=Path(folder), sample_prompts=(), epoch_weights=False
        )
        try:
            return pool.submit(_measure, small).result()
        except (BrokenProcessPool, MemoryError) as error:
            raise CapacityError(
                f"A step of {job.plan.resolved.tokens_per_row:,} tokens ran out of memory.",
                hint=f"set tokens_per_row and max_tokens to {max(64, job.plan.resolved.tokens_per_row // 2)}",
            ) from error


def _measure(job: TrainingJob) -> Measured:
    seen: list[StepMetrics] = []

    def stop() -> None:
        if len(seen) == STEPS:
            raise RunStopped("measured")

    resolved = job.plan.resolved.model_copy(update={"epochs": float(STEPS), "batch_size": len(job.examples)})
    plan = job.plan.model_copy(update={"resolved": resolved, "steps": STEPS + 1})
    try:
        train(replace(job, plan=plan), seen.append, stop)
    except RunStopped:
        pass
    except RuntimeError as error:  # torch has an error of its own for a GPU, and none for the processor's memory
        if "memory" in str(error).lower():
            raise MemoryError(str(error).splitlines()[0]) from None
        raise
    tokens = sum(tokens_of(unit) for unit in job.examples)
    computed = sum(len(row.tokens) for row in rows_of(job.examples, plan.shared_prefix, resolved))
    return Measured(tokens=computed, seconds=tokens / seen[-1].tokens_per_second, peak_bytes=peak_memory_bytes())


def _longest(units: Sequence[Unit], plan: TrainingPlan) -> list[Unit]:
    """Return the longest units that fill a row, at most a batch of them."""
    found: list[Unit] = []
    tokens = 0
    for unit in heapq.nlargest(plan.resolved.batch_size, units, key=tokens_of):
        if found and tokens >= plan.resolved.tokens_per_row:
            break
        found.append(unit)
        tokens += tokens_of(unit) - plan.shared_prefix
    return found


def _smaller(plan: TrainingPlan) -> TrainingPlan | None:
    """Return the plan with rows of half the length, or with layers recomputed; None where both are done."""
    resolved = plan.resolved
    if resolved.tokens_per_row > plan.longest_example:
        row = max(plan.longest_example, resolved.tokens_per_row // 2)
        change, note = {"tokens_per_row": row}, Derived(name="tokens per row", value=str(row), reason="measured to fit")
    elif not resolved.recompute:
        change, note = {"recompute": True}, Derived(name="recompute", value="yes", reason="measured to fit")
    else:
        return None
    return plan.model_copy(update={"resolved": resolved.model_copy(update=change), "reasons": (*plan.reasons, note)})
