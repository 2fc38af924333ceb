"""Where a run's numbers and texts are written to: TensorBoard always; W&B and MLflow where installed and asked for.

W&B and MLflow are guests: what they lack is said before training starts, and one that fails in the middle is dropped
(:attr:`Trackers.failures`), for no run should end because a dashboard did. Nothing leaves the machine that was not
asked for: W&B is offline without ``WANDB_API_KEY``, MLflow is a file without ``MLFLOW_TRACKING_URI``, and what both
would report to their makers is switched off.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import json
import os
import re
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from torch.utils.tensorboard import SummaryWriter

from luthier.errors import InputError, MissingDependencyError, RunStopped, did_you_mean
from luthier.records.training import StepMetrics

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Outcome = Literal["finished", "stopped", "failed"]

PROJECT = "luthier"  # W&B's project and MLflow's experiment, where the environment names no other
PARAMETERS_PER_CALL = 100  # MLflow's limits
METRICS_PER_CALL = 1000


class Tracker(Protocol):
    """Takes a run's numbers and texts. Steps never fall, except where a run goes on from its checkpoint."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by their tags."""

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text, shown as it is."""

    def close(self, outcome: Outcome = "finished") -> None:
        """Write out what is left, and how the run ended."""


def values_of(metrics: StepMetrics) -> dict[str, float]:
    """Return a step's numbers by their tags; what was not measured, or is not a finite number, is left out."""
    known = {
        "loss/train": metrics.train_loss,
        "optimizer/learning_rate": metrics.learning_rate,
        "optimizer/gradient_norm": metrics.gradient_norm,
        "speed/tokens_per_second": metrics.tokens_per_second,
        "loss/validation": metrics.valid_loss,
    }
    values = {name: value for name, value in known.items() if value is not None}
    values |= {f"train/{name}": value for name, value in metrics.train_metrics.items()}
    values |= {f"validation/{name}": value for name, value in metrics.valid_metrics.items()}
    return values


class Trackers:
    """Passes everything on to all trackers; as a context manager, closes them with the run's outcome.

    ``failures`` has, by its name, what went wrong with a guest that was dropped.
    """

    def __init__(self, own: Tracker, guests: Mapping[str, Tracker]) -> None:
        self._own = own
        self._guests = dict(guests)
        self.failures: dict[str, str] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by their tags."""
        self._own.write(step, values)
        self._to_guests(lambda guest: guest.write(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text, shown as it is."""
        self._own.text(step, name, text)
        self._to_guests(lambda guest: guest.text(step, name, text))

    def close(self, outcome: Outcome = "finished") -> None:
        """Close all."""
        try:
            self._own.close(outcome)
        finally:
            self._to_guests(lambda guest: guest.close(outcome))

    def _to_guests(self, act: Callable[[Tracker], None]) -> None:
        for name, guest in list(self._guests.items()):
            try:
                act(guest)
            except Exception as error:  # noqa: BLE001 - a service's own and its network's errors have no common root
                self.failures[name] = f"{type(error).__name__}: {error}"
                del self._guests[name]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else "stopped" if isinstance(error, RunStopped) else "failed")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed; imports nothing.

    Raises:
        InputError: a name is unknown.
        MissingDependencyError: a package is missing; the hint is the command that installs it.
    """
    unknown = [name for name in names if name not in _KNOWN]
    if unknown:
        problems = [f"{name!r}.{did_you_mean(name, _KNOWN)}" for name in unknown]
        raise InputError("These trackers are not known.", problems=problems)
    missing = [name for name in dict.fromkeys(names) if name in _GUESTS and not _installed(name)]
    if missing:
        raise MissingDependencyError(
            f"Tracking with {' and '.join(missing)} needs packages that are not installed.",
            hint=f"pip install {' '.join(missing)}",
        )


def open_trackers(names: Sequence[TrackerName], folder: Path, run_name: str, config: Mapping[str, Any]) -> Trackers:
    """Open TensorBoard in ``folder / "tensorboard"`` and the guests that are named.

    A guest that has a run of this name goes on with it. ``config`` is what the run was asked for, as JSON.

    Raises:
        InputError: a name is unknown, or a guest cannot be opened.
        MissingDependencyError: a guest is not installed.
    """
    check_trackers(names)
    own = TensorBoard(folder / "tensorboard", config)
    guests: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        if name not in _GUESTS:
            continue
        try:
            guests[name] = _GUESTS[name](folder, run_name, config)
        except Exception as error:
            Trackers(own, guests).close("failed")
            raise InputError(
                f"{name} cannot be opened: {type(error).__name__}: {error}",
                hint=f"check the {name.upper()}_* environment variables, or leave {name} out",
            ) from error
    return Trackers(own, guests)


class TensorBoard:
    """One event file in a folder; look at it with ``tensorboard --logdir``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        self.text(0, "config", json.dumps(config, indent=2, ensure_ascii=False, default=str))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text; indented, for TensorBoard reads Markdown and this must stay as it is."""
        self._writer.add_text(name, textwrap.indent(text, "    ", lambda _: True), step)

    def close(self, outcome: Outcome = "finished") -> None:
        """Write out what is left."""
        self._writer.close()


class WandB:
    """A W&B run: in ``folder / "wandb"`` to be sent by ``wandb sync``, or online with ``WANDB_API_KEY``.

    ``WANDB_PROJECT``, ``WANDB_ENTITY`` and, with a key, ``WANDB_MODE`` are heeded, where the run's own options
    (``wandb`` in its configuration) name no other project, team, name or tags.
    """

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import: crash reports to its makers
        self._wandb = importlib.import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        online = bool(os.environ.get("WANDB_API_KEY"))
        asked = config.get("options", {}).get("wandb") or {}
        self._run = self._wandb.init(
            project=asked.get("project") or os.environ.get("WANDB_PROJECT", PROJECT),
            entity=asked.get("entity"),
            name=asked.get("name") or run_name,
            tags=list(asked.get("tags") or ()),
            id=re.sub(r"[^\w-]", "-", run_name)[:64],
            resume="allow",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "online") if online else "offline",
            config=dict(config),
            settings=self._wandb.Settings(
                silent=True, console="off", save_code=False, disable_code=True, disable_git=True
            ),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values."""
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text as an HTML panel."""
        panel = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({name: panel}, step=step)

    def close(self, outcome: Outcome = "finished") -> None:
        """Finish the run."""
        self._run.finish(exit_code=1 if outcome == "failed" else 0)


class MLflow:
    """An MLflow run: at ``MLFLOW_TRACKING_URI``, or in ``folder / "mlflow"`` (SQLite, texts as artifacts).

    ``MLFLOW_EXPERIMENT_NAME`` is heeded. Letters that MLflow refuses in names become ``_``.
    """

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before its import
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # not minutes in the middle of a training
        self._mlflow = importlib.import_module("mlflow")
        remote = os.environ.get("MLFLOW_TRACKING_URI")
        local = folder.resolve() / "mlflow"
        if not remote:
            local.mkdir(parents=True, exist_ok=True)
        self._client = self._mlflow.MlflowClient(tracking_uri=remote or f"sqlite:///{local}/mlflow.db")
        self._run_id = self._open(run_name, None if remote else (local / "artifacts").as_uri(), config)

    def _open(self, run_name: str, artifacts: str | None, config: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        key = re.sub(r"[^\w.-]", "-", run_name)
        before = self._client.search_runs([experiment], f"tags.`luthier.run` = '{key}'", max_results=1)
        if before:
            run_id = str(before[0].info.run_id)
            self._client.update_run(run_id, status="RUNNING")
            return run_id  # its parameters are there, and MLflow lets none change
        run_id = str(self._client.create_run(experiment, run_name=run_name, tags={"luthier.run": key}).info.run_id)
        parameters = [self._mlflow.entities.Param(_mlflow_key(k), v) for k, v in _flat(config).items()]
        for start in range(0, len(parameters), PARAMETERS_PER_CALL):
            self._client.log_batch(run_id, params=parameters[start : start + PARAMETERS_PER_CALL])
        return run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics in one call."""
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        metrics = [metric(_mlflow_key(name), float(value), now, step) for name, value in values.items()]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def text(self, step: int, name: str, text: str) -> None:
        """Store a text as the artifact ``<name>/<step>.txt``."""
        self._client.log_text(self._run_id, text, f"{_mlflow_key(name)}/{step:08d}.txt")

    def close(self, outcome: Outcome = "finished") -> None:
        """End the run."""
        statuses = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self._run_id, statuses[outcome])


_GUESTS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {"wandb": WandB, "mlflow": MLflow}
_KNOWN = ("tensorboard", *_GUESTS)


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # without an origin it is but a folder of that name


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested options as one level, with dots in the names."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _mlflow_key(name: str) -> str:
    return re.sub(r"[^\w.\- /]", "_", name)[:250]
