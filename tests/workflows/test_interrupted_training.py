"""A training run that is killed, paused or cancelled at any moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from luthier.errors import ConflictError, InputError, NotFoundError, RunStopped
from luthier.jobs.launch import follow, start, submit
from luthier.records.run import RunEvent
from luthier.records.training import TrainingConfig
from luthier.store.store import Store
from luthier.workflows.training import TrainRequest, finished_result, plan
from tests.workflows.conftest import make_dataset

LONG = TrainingConfig(epochs=40, batch_size=4, lora_rank=4, precision="float32", learning_rate=3e-3, checkpoints=40)


def request(store: Store, folder: Path, **changes: object) -> TrainRequest:
    dataset, template = make_dataset(store, folder)
    values = {
        "base": "tiny-base",
        "dataset": dataset.reference,
        "template": template.reference,
        "options": LONG,
        "parity_prompts": 0,
    }
    return TrainRequest.model_validate(values | changes)


def wait_for_metrics(store: Store, run_id: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(store.runs.events(run_id, type="metrics")) < count:
        assert time.monotonic() < deadline, store.runs.events(run_id)
        time.sleep(0.05)


def test_a_killed_run_is_taken_up_again_and_its_model_registered_once(store: Store, tmp_path: Path) -> None:
    run = submit(store, "train", request(store, tmp_path))
    process = start(store, run.id)
    wait_for_metrics(store, run.id, 2)
    assert store.models.all() == []
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert store.runs.get(run.id).status == "running"
    finished = follow(store, run.id)
    assert finished.status == "succeeded"
    assert finished.attempts == 1  # it came forward, so that its death does not count any more
    assert [model.run_id for model in store.models.all()] == [run.id]
    messages = [event.message for event in store.runs.events(run.id)]
    assert any("attempt 2 goes on from the last checkpoint" in message for message in messages)
    steps = [event.data["step"] for event in store.runs.events(run.id, type="metrics")]
    assert steps[-1] == store.models.all()[0].training.steps


def test_a_paused_run_goes_on_where_it_was(store: Store, tmp_path: Path) -> None:
    run = submit(store, "train", request(store, tmp_path))
    seen: list[RunEvent] = []

    def pause_once_it_trains() -> None:
        wait_for_metrics(store, run.id, 2)
        store.runs.request(run.id, "pause")

    asking = threading.Thread(target=pause_once_it_trains)
    asking.start()
    paused = follow(store, run.id, seen.append)
    asking.join()
    assert paused.status == "paused"
    with pytest.raises(RunStopped, match="paused"):
        finished_result(store, run.id)
    at = [event.data["step"] for event in seen if event.type == "metrics"][-1]
    store.runs.requeue(run.id)
    assert follow(store, run.id, after=seen[-1].sequence).status == "succeeded"
    later = [e.data["step"] for e in store.runs.events(run.id, after=seen[-1].sequence, type="metrics")]
    assert later[0] > at


def test_a_cancelled_run_leaves_no_model(store: Store, tmp_path: Path) -> None:
    run = submit(store, "train", request(store, tmp_path))
    process = start(store, run.id)
    wait_for_metrics(store, run.id, 1)
    store.runs.request(run.id, "cancel")
    process.wait()
    assert store.runs.get(run.id).status == "cancelled"
    assert store.models.all() == []
    with pytest.raises(RunStopped, match="is cancelled") as stopped:
        finished_result(store, run.id)
    assert stopped.value.hint is None
    with pytest.raises(ConflictError, match="is cancelled"):
        store.runs.requeue(run.id)


def test_what_cannot_be_trained_is_refused_before_a_run_begins(store: Store, tmp_path: Path) -> None:
    good = request(store, tmp_path)
    with pytest.raises(NotFoundError, match="Did you mean 'questions'"):
        plan(store, good.model_copy(update={"dataset": "qestions"}))
    with pytest.raises(NotFoundError, match="Did you mean 'tiny-base'"):
        plan(store, good.model_copy(update={"base": "tiny-bas"}))
    with pytest.raises(InputError, match="suffix 'a b' is not"):
        plan(store, good.model_copy(update={"suffix": "a b"}))
    with pytest.raises(InputError, match="not divided"):
        plan(store, good.model_copy(update={"dataset": "questions@1"}))
    with pytest.raises(InputError, match="cannot be learned"):
        plan(store, good.model_copy(update={"options": LONG.model_copy(update={"max_tokens": 8})}))


def test_a_failing_run_says_why(store: Store, tmp_path: Path) -> None:
    bad = request(store, tmp_path, options=LONG.model_copy(update={"max_tokens": 8}))
    run = submit(store, "train", bad)
    assert follow(store, run.id).status == "failed"
    with pytest.raises(InputError, match="cannot be learned"):
        finished_result(store, run.id)
