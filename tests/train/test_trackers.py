"""Trackers: one contract for TensorBoard, W&B and MLflow, each really written and read back."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from luthier.errors import InputError, LuthierError, MissingDependencyError, RunStopped
from luthier.train.engine import trackers
from luthier.train.engine.trackers import Outcome, Trackers, check_trackers, open_trackers, values_of

CONFIG = {"base": "tiny", "options": {"epochs": 3, "schedule": "cosine", "nothing": {}}}
ANSWER = "Q: 1 < 2?\n<b>**yes**</b>"


@pytest.fixture(autouse=True)
def _no_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def metrics(**changes: object) -> Any:
    values: dict[str, object] = {
        "train_loss": 1.5,
        "valid_loss": 1.7,
        "train_metrics": {"token_accuracy": 0.5},
        "valid_metrics": {"token_accuracy": 0.4},
        "learning_rate": 1e-4,
        "gradient_norm": 0.8,
        "tokens_per_second": 900.0,
    }
    return SimpleNamespace(**values | changes)


def write_run(names: list[Any], folder: Path) -> None:
    with open_trackers(names, folder, "ftjob-1", CONFIG) as board:
        for step in (1, 2, 3):
            board.write(step, values_of(metrics(train_loss=1.5 / step)))
            board.text(step, "samples", ANSWER)
    assert board.failures == {}


def tensorboard_of(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_every_number_of_a_step_has_a_tag() -> None:
    assert values_of(metrics()) == {
        "loss/train": 1.5,
        "loss/validation": 1.7,
        "train/token_accuracy": 0.5,
        "validation/token_accuracy": 0.4,
        "optimizer/learning_rate": 1e-4,
        "optimizer/gradient_norm": 0.8,
        "speed/tokens_per_second": 900.0,
    }


def test_a_validation_that_was_not_made_has_no_tags() -> None:
    values = values_of(metrics(valid_loss=None, valid_metrics={}))
    assert not [tag for tag in values if "validation" in tag]


@pytest.mark.parametrize("names", [[], ["tensorboard"], ["tensorboard", "tensorboard"]])
def test_tensorboard_is_always_written(tmp_path: Path, names: list[str]) -> None:
    write_run(names, tmp_path)
    board = tensorboard_of(tmp_path)
    assert [(event.step, event.value) for event in board.Scalars("loss/train")] == [(1, 1.5), (2, 0.75), (3, 0.5)]
    assert [event.value for event in board.Scalars("validation/token_accuracy")] == pytest.approx([0.4] * 3)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_shows_texts_and_the_config_as_they_are(tmp_path: Path) -> None:
    write_run([], tmp_path)
    board = tensorboard_of(tmp_path)
    texts = board.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [1, 2, 3]
    assert texts[0].tensor_proto.string_val[0].decode() == "    Q: 1 < 2?\n    <b>**yes**</b>"
    assert b'"schedule": "cosine"' in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    write_run([], tmp_path)
    with open_trackers([], tmp_path, "ftjob-1", CONFIG) as board:
        board.write(4, {"loss/train": 0.25})
    assert [event.step for event in tensorboard_of(tmp_path).Scalars("loss/train")] == [1, 2, 3, 4]


def test_an_unknown_tracker_is_refused_with_the_name_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'wandb'") as caught:
        check_trackers(["tensorboard", "wandbb", "neptune"])
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError):
        open_trackers(["wandbb"], tmp_path, "ftjob-1", CONFIG)  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_trackers_that_are_not_installed_are_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # a folder of that name is no package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingDependencyError) as caught:
        check_trackers(["mlflow", "tensorboard", "wandb", "mlflow"])
    assert caught.value.hint == "pip install mlflow wandb"


class Notes:
    """A tracker in memory that fails when told to."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.steps: list[int] = []
        self.outcomes: list[Outcome] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("the dashboard is away")
        self.steps.append(step)

    def text(self, step: int, name: str, text: str) -> None:
        self.steps.append(step)

    def close(self, outcome: Outcome = "finished") -> None:
        self.outcomes.append(outcome)


def test_a_guest_that_fails_is_dropped_and_the_others_go_on() -> None:
    own, failing, other = Notes(), Notes(fails_at=2), Notes()
    with Trackers(own, {"wandb": failing, "mlflow": other}) as board:
        for step in (1, 2, 3):
            board.write(step, {"loss/train": 1.0})
    assert board.failures == {"wandb": "ConnectionError: the dashboard is away"}
    assert (own.steps, failing.steps, other.steps) == ([1, 2, 3], [1], [1, 2, 3])
    assert (own.outcomes, other.outcomes) == (["finished"], ["finished"])


def test_a_failure_of_the_own_tracker_is_not_hidden() -> None:
    own, guest = Notes(fails_at=1), Notes()
    with pytest.raises(ConnectionError), Trackers(own, {"wandb": guest}) as board:
        board.write(1, {})
    assert (own.outcomes, guest.outcomes) == (["failed"], ["failed"])


@pytest.mark.parametrize(
    ("error", "outcome"), [(RunStopped("paused"), "stopped"), (LuthierError("broken"), "failed"), (None, "finished")]
)
def test_trackers_are_told_how_the_run_ended(error: Exception | None, outcome: Outcome) -> None:
    own, guest = Notes(), Notes()

    def run() -> None:
        with Trackers(own, {"mlflow": guest}):
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            run()
    else:
        run()
    assert own.outcomes == guest.outcomes == [outcome]


def test_a_guest_that_cannot_be_opened_is_refused_and_the_opened_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Notes()

    def fails(folder: Path, run_name: str, config: Mapping[str, Any]) -> Notes:
        raise ConnectionError("nobody there")

    guests: dict[str, Callable[..., Notes]] = {"wandb": lambda *_: first, "mlflow": fails}
    monkeypatch.setattr(trackers, "_GUESTS", guests)
    monkeypatch.setattr(trackers, "_installed", lambda name: True)
    with pytest.raises(InputError, match="mlflow cannot be opened: ConnectionError: nobody there") as caught:
        open_trackers(["wandb", "mlflow"], tmp_path, "ftjob-1", CONFIG)
    assert "MLFLOW_" in str(caught.value.hint)
    assert first.outcomes == ["failed"]


def test_wandb_writes_an_offline_run_with_numbers_texts_and_config(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    write_run(["wandb"], tmp_path)
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-ftjob-1.wandb")
    records = wandb_records(log)
    losses = [values["loss/train"] for values in records["history"] if "loss/train" in values]
    assert losses == ["1.5", "0.75", "0.5"]
    assert '"cosine"' in records["config"]["options"]
    texts = list(log.parent.glob("files/media/html/*.html"))
    assert texts
    assert "Q: 1 &lt; 2?" in texts[0].read_text()


def wandb_records(log: Path) -> dict[str, Any]:
    """Return the steps and the config of W&B's own log file."""
    record_kind = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    history, config = [], {}
    for data in leveldb_records(log.read_bytes()):
        record = record_kind()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            history.append({"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item})
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: item.value_json for item in record.run.config.update}
    return {"history": history, "config": config}


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: blocks of 32 KiB, parts with checksum, length and kind."""
    at, whole = 7, b""  # W&B's mark comes first
    while at + 7 <= len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or its last part
            yield whole
            whole = b""


def mlflow_runs(folder: Path) -> tuple[Any, list[Any]]:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("luthier").experiment_id])


def test_mlflow_writes_a_run_that_its_client_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    write_run(["mlflow"], tmp_path)
    client, (run,) = mlflow_runs(tmp_path)
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.5), (2, 0.75), (3, 0.5)]
    assert run.data.params == {
        "base": "tiny",
        "options.epochs": "3",
        "options.schedule": "cosine",
        "options.nothing": "{}",
    }
    assert (run.info.run_name, run.info.status) == ("ftjob-1", "FINISHED")
    (text,) = (tmp_path / "mlflow").rglob("samples/00000002.txt")
    assert text.read_text() == ANSWER


def test_mlflow_goes_on_with_the_run_of_the_same_name(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    board = open_trackers(["mlflow"], tmp_path, "ftjob-1", CONFIG)
    board.write(1, {"loss/train": 1.0})
    board.close("stopped")
    client, (run,) = mlflow_runs(tmp_path)
    assert run.info.status == "KILLED"
    with open_trackers(["mlflow"], tmp_path, "ftjob-1", CONFIG | {"base": "other"}) as board:
        board.write(2, {"loss/train": 0.5, "train/grader: f(x)=1": 1.0})
    assert board.failures == {}
    client, (run,) = mlflow_runs(tmp_path)
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss/train")] == [1, 2]
    assert run.data.metrics["train/grader_ f_x__1"] == 1.0
    assert (run.info.status, run.data.params["base"]) == ("FINISHED", "tiny")
