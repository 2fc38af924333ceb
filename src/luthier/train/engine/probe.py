"""Knowing before: makes steps at the longest length in a process of its own, and says what they took."""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from luthier.errors import CapacityError, EngineError, LuthierError, RunStopped
from luthier.records.training import AUTO, Derived, Measured, StepMetrics, TrainingConfig, TrainingPlan
from luthier.train.engine.loop import TrainingJob, peak_memory_bytes, train
from luthier.train.engine.objectives.objective import Unit, tokens_of
from luthier.train.plan import refuse_what_cannot_fit, rows_of, with_measured

STEPS = 2  # the first one also pays for buffers and threads
HALVINGS = 8
SURELY_OVER = 1.2  # what ran out of memory is taken to need so much more than there is
FIRST_TO_GO = "1000"  # the highest score of Linux: where memory runs out, the process of the steps is what it ends


def measured_plan(
    job: TrainingJob, options: TrainingConfig, on_attempt: Callable[[str], None] = lambda text: None
) -> TrainingPlan:
    """Return the job's plan with the memory and time of steps that were really made at the longest length.

    Where they do not fit, rows are halved, then layers recomputed, as far as the options leave that open, and it is
    tried again.

    Raises:
        CapacityError: nothing fits; the hint says what to lower, and to what.
        EngineError: the steps could not be made, for another reason.
    """
    plan = job.plan
    for _ in range(HALVINGS):
        on_attempt(f"Trying steps of {plan.resolved.tokens_per_row:,} tokens")
        try:
            return with_measured(plan, measure_steps(replace(job, plan=plan)))
        except CapacityError as error:
            smaller = _smaller(plan, options)
            if smaller is None:
                raise _refusal(plan, error) from error
            plan = smaller
    raise CapacityError("No step of this run fits into memory.", hint="take a smaller base model, or mode qlora")


def measure_steps(job: TrainingJob) -> Measured:
    """Make :data:`STEPS` steps on the longest units, in a process of its own.

    Raises:
        CapacityError: the steps ran out of memory, or the system killed their process.
        EngineError: the process ended for another reason.
    """
    # Threads of a process that inherits this give way to others while they wait, as those of a run do.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    spawned = multiprocessing.get_context("spawn")
    receiving, sending = spawned.Pipe(duplex=False)
    with TemporaryDirectory() as folder:
        small = replace(
            job,
            examples=_longest(job),
            validation=(),
            test=(),
            folder=Path(folder),
            sample_prompts=(),
            epoch_weights=False,
            checkpoint_seconds=None,
        )
        process = spawned.Process(target=_answer, args=(small, sending), daemon=True)
        process.start()
        sending.close()
        try:
            with suppress(EOFError):
                return _outcome(receiving.recv())
            process.join()
        finally:
            process.kill()
            process.join()
            receiving.close()
    if process.exitcode != -signal.SIGKILL:
        raise EngineError(f"The process that makes steps to measure them ended with {process.exitcode}.")
    raise CapacityError(
        f"The system ended a step of {job.plan.resolved.tokens_per_row:,} tokens, as one does that is out of memory."
    )


def _outcome(answer: Measured | BaseException) -> Measured:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _answer(job: TrainingJob, sending: Connection) -> None:
    """Send what the steps took, or why they could not be made."""
    with suppress(OSError):  # not on Linux
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    try:
        sending.send(_measure(job))
    except MemoryError as error:
        sending.send(CapacityError(f"A step of {job.plan.resolved.tokens_per_row:,} tokens ran out of memory: {error}"))
    except LuthierError as error:
        sending.send(error)
    except Exception:  # noqa: BLE001 - whatever it is, the other process must hear of it
        sending.send(EngineError(f"The steps to measure failed.\n{traceback.format_exc()}"))


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


def _longest(job: TrainingJob) -> Sequence[Unit]:
    """Return the longest units of all sides that fill a row, at most a batch of them."""
    found: list[Unit] = []
    tokens = 0
    sides = chain(job.examples, job.validation, job.test)
    for unit in heapq.nlargest(job.plan.resolved.batch_size, sides, key=tokens_of):
        if found and tokens >= job.plan.resolved.tokens_per_row:
            break
        found.append(unit)
        tokens += tokens_of(unit) - job.plan.shared_prefix
    return found


def _refusal(plan: TrainingPlan, error: CapacityError) -> CapacityError:
    """Return the error with what would make the plan fit, where the estimate had not seen that it does not."""
    need = max(plan.memory_bytes, int(plan.machine_memory_bytes * SURELY_OVER))
    try:
        refuse_what_cannot_fit(plan.model_copy(update={"memory_bytes": need}))
    except CapacityError as refused:
        return CapacityError(error.message, hint=error.hint or refused.hint)
    return error


def _smaller(plan: TrainingPlan, options: TrainingConfig) -> TrainingPlan | None:
    """Return the plan with rows of half the length, or with layers recomputed; None where both are done or given."""
    resolved = plan.resolved
    if options.tokens_per_row == AUTO and resolved.tokens_per_row > plan.longest_example:
        row = max(plan.longest_example, resolved.tokens_per_row // 2)
        change, note = {"tokens_per_row": row}, Derived(name="tokens per row", value=str(row), reason="measured to fit")
    elif options.recompute == AUTO and not resolved.recompute:
        change, note = {"recompute": True}, Derived(name="recompute", value="yes", reason="measured to fit")
    else:
        return None
    return plan.model_copy(update={"resolved": resolved.model_copy(update=change), "reasons": (*plan.reasons, note)})
