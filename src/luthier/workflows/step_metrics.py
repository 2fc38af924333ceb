"""The numbers of every step of a run: kept beside its checkpoints, and given to its project as a file at the end."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from luthier.errors import NotFoundError
from luthier.records.run import Run
from luthier.records.training import StepMetrics, TrainingPlan
from luthier.store.store import Store
from luthier.workflows.files import add_file

PLAN_FILE = "plan.json"
STEPS_FILE = "steps.jsonl"
RESULT_FILE = "step_metrics.csv"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
ACCURACIES = ("token_accuracy", "reward_accuracy", "accuracy")


def read_plan(folder: Path) -> TrainingPlan | None:
    """Return the plan that a run in this folder keeps to; None where it has none yet."""
    path = folder / PLAN_FILE
    return TrainingPlan.model_validate_json(path.read_text("utf-8")) if path.is_file() else None


def write_plan(folder: Path, plan: TrainingPlan) -> None:
    """Keep a run's plan, whole or not at all."""
    staged = folder / f".{PLAN_FILE}"
    staged.write_text(plan.model_dump_json(), "utf-8")
    staged.rename(folder / PLAN_FILE)


class StepLog:
    """One JSON line for every step, in a run's folder. Steps that are made again after a kill are there twice."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / STEPS_FILE).open("a", encoding="utf-8")
        self._file.write("\n")  # ends a line that a killed process began

    def write(self, metrics: StepMetrics) -> None:
        """Keep a step; it survives this process."""
        self._file.write(metrics.model_dump_json() + "\n")
        self._file.flush()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_steps(folder: Path) -> list[StepMetrics]:
    """Return a run's steps in their order; of one that was made twice, what was said last."""
    steps: dict[int, StepMetrics] = {}
    path = folder / STEPS_FILE
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            metrics = StepMetrics.model_validate_json(line)
        except ValidationError:
            continue  # blank, or cut off by a kill
        steps[metrics.step] = metrics
    return [steps[step] for step in sorted(steps)]


def add_result_file(store: Store, run: Run) -> str:
    """Give a run's numbers to its project as ``step_metrics.csv``, once, and return the file's id."""
    id = f"file-{hashlib.sha256(f'step_metrics {run.id}'.encode()).hexdigest()[:32]}"
    try:
        return store.files.get(run.project, id).id
    except NotFoundError:
        store.artifacts.remove(f"files/{id}")  # bytes whose record a killed process did not come to
    content = io.BytesIO(_csv(read_steps(store.run_folder(run.id))).encode())
    return add_file(store, run.project, RESULT_FILE, "fine-tune-results", content, id=id).id


def _csv(steps: list[StepMetrics]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in steps:
        accuracy = _finite(next((step.train_metrics[name] for name in ACCURACIES if name in step.train_metrics), None))
        valid_accuracy = _finite(step.valid_metrics.get("token_accuracy"))
        values = (_finite(step.train_loss), accuracy, _finite(step.valid_loss), valid_accuracy)
        writer.writerow([step.step, *("" if value is None else f"{value:.6g}" for value in values)])
    return text.getvalue()


def openai_metrics(values: Mapping[str, object]) -> dict[str, float]:
    """Return a step's numbers (a :class:`StepMetrics` as JSON) by OpenAI's names; what was not measured is left out.

    Every validation is over all of the validation examples, so the ``full_`` values are the same.
    """
    found: dict[str, object] = {"step": values.get("step"), "total_steps": values.get("steps")}
    found["train_loss"] = values.get("train_loss")
    found |= _named("train", values.get("train_metrics"))
    for prefix in ("valid", "full_valid"):
        found[f"{prefix}_loss"] = values.get("valid_loss")
        found |= _named(prefix, values.get("valid_metrics"))
    numbers = {name: _finite(value) for name, value in found.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _named(prefix: str, metrics: object) -> dict[str, object]:
    known = metrics if isinstance(metrics, dict) else {}
    return {f"{prefix}_{'mean_' if name == 'token_accuracy' else ''}{name}": value for name, value in known.items()}


def _finite(value: object) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
