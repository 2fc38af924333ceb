from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import ConflictError
from luthier.jobs.launch import submit
from luthier.records.training import TrainingConfig
from luthier.store.store import Store
from luthier.workflows.material import TrainRequest
from tests.cli.command import run

ERROR = (
    "The data of [sayings@2] cannot be learned from: 60 of 60 examples have no label.\n  - example 0 has no 'intent'"
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    return Store(tmp_path / "home")


def failed(store: Store) -> str:
    """Put a run into the queue, and let it fail."""
    options = TrainingConfig.model_validate(
        {"method": "dpo", "dpo": {"beta": 0.2}, "trackers": ["wandb", "mlflow"], "columns": {"weight": "importance"}}
    )
    queued = submit(store, "train", TrainRequest(base="tiny", dataset="sayings@2", options=options))
    store.runs.claim("one", 600, lambda owner: False, queued.id)
    store.runs.finish(queued.id, "one", "failed", error=ERROR)
    return queued.id


def test_a_run_is_one_line_in_the_list_with_its_status_whole_and_its_error_cut(store: Store) -> None:
    id = failed(store)
    (line,) = [line for line in run("run", "list").splitlines() if id in line]
    assert " failed " in line
    assert "The data of [" in line
    assert line.rstrip().endswith("…")
    assert len(line) <= 80
    assert "example 0" not in run("run", "list")


def test_a_run_is_shown_by_what_was_chosen_and_with_its_whole_error(store: Store) -> None:
    shown = [" ".join(line.split()) for line in run("run", "show", failed(store)).splitlines()]
    assert {"dataset sayings@2", "options.method dpo", "options.dpo.beta 0.2"} <= set(shown)
    assert {"options.trackers wandb, mlflow", "options.columns.weight importance"} <= set(shown)
    assert "error The data of [sayings@2] cannot be learned from: 60 of" in shown
    assert "- example 0 has no 'intent'" in shown
    assert not [line for line in shown if "{" in line or "options.seed" in line or "suffix" in line]


def test_a_cancelled_run_is_not_resumed(store: Store) -> None:
    id = submit(store, "train", TrainRequest(base="tiny", dataset="sayings@2")).id
    assert "cancelled" in run("run", "cancel", id)
    with pytest.raises(ConflictError, match="is cancelled; only a paused or failed one can be resumed"):
        run("run", "resume", id)
