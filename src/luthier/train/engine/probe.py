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
from luthier.records.base_model import Machine
from luthier.records.training import Measured, StepMetrics, TrainingConfig, TrainingPlan
from luthier.templates.renderer import Unit, tokens_of
from luthier.train.engine.loop import TrainingJob, peak_memory_bytes, train
from luthier.train.plan import out_of_memory, rows_of, smaller, with_measured

STEPS = 2  # the first one also pays for buffers and threads
FIRST_TO_GO = "1000"  # the highest score of Linux: where memory runs out, the process of the steps is what it ends


def measured_plan(
    job: TrainingJob, options: TrainingConfig, machine: Machine, on_attempt: Callable[[str], None] = lambda text: None
) -> TrainingPlan:
    """Return the job's plan with the memory and time of steps that were really made at the longest length.

    Where they do not fit, what the options leave open is given up bit by bit (:func:`luthier.train.plan.smaller`), and
    it is tried again.

    Raises:
        CapacityError: nothing fits; the hint says what to lower, and to what.
        EngineError: the steps could not be made, for another reason.
    """
    plan = job.plan
    while True:
        on_attempt(f"Trying steps of {plan.resolved.tokens_per_row:,} tokens")
        try:
            return with_measured(plan, measure_steps(replace(job, plan=plan)))
        except CapacityError:
            less = smaller(plan.resolved, options, plan.longest_example, machine)
            if less is None:
                raise
            resolved, reason = less
            plan = plan.model_copy(update={"resolved": resolved, "reasons": (*plan.reasons, reason)})


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
    raise out_of_memory(job.plan, "the system ended the process that made it")


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
    with suppress(RunStopped):
        train(replace(job, plan=plan), seen.append, stop)
    tokens = sum(tokens_of(unit) for unit in job.examples)
    computed = sum(len(row.tokens) for row in rows_of(job.examples, plan))
    return Measured(tokens=computed, seconds=tokens / seen[-1].tokens_per_second, peak_bytes=peak_memory_bytes())


def _longest(job: TrainingJob) -> Sequence[Unit]:
    """Return the longest units of all sides that fill a row, at most a batch of them."""
    found: list[Unit] = []
    sides = chain(job.examples, job.validation, job.test)
    for unit in heapq.nlargest(job.plan.resolved.batch_size, sides, key=tokens_of):
        found.append(unit)
        if sum(len(row.tokens) for row in rows_of(found, job.plan)) >= job.plan.resolved.tokens_per_row:
            break
    return found
