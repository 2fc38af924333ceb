"""Runs that learn from uploaded files: what becomes of the files, of a killed worker, and of wrong rows."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import EngineError, InputError, NotFoundError
from luthier.jobs.launch import follow, start, submit
from luthier.jobs.worker import work
from luthier.records.fine_tuning import JobRequest, TrainingFiles
from luthier.records.run import Run
from luthier.records.training import StepMetrics, TrainingConfig
from luthier.serve.api_error import ApiError
from luthier.store.store import Store
from luthier.workflows.checkpoints import checkpoint_folder, keep_checkpoint
from luthier.workflows.files import add_file, file_path
from luthier.workflows.fine_tuning import job_object
from luthier.workflows.fine_tuning_jobs import create_job
from luthier.workflows.models import delete_model, served_folder
from luthier.workflows.step_metrics import StepLog, add_result_file, read_steps
from luthier.workflows.training import TrainRequest
from luthier.workflows.training_files import dataset_of_files

WORDS = ("order", "message", "tweet", "model", "dog", "fox")


def chats(count: int = 12) -> list[dict[str, Any]]:
    """Return conversations whose answer is a word of the question."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {WORDS[index % 6]} number {index}"},
                {"role": "assistant", "content": WORDS[index % 6]},
            ]
        }
        for index in range(count)
    ]


def upload(store: Store, rows: list[Any], project: str = "default") -> str:
    """Keep rows as a training file of a project, and return its id."""
    content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    return add_file(store, project, "rows.jsonl", "fine-tune", io.BytesIO(content.encode())).id


def test_all_examples_of_the_training_file_are_trained_on_and_the_dataset_is_made_once(store: Store) -> None:
    files = TrainingFiles(training=upload(store, chats(7)), validation=upload(store, chats(3)))
    dataset = dataset_of_files(store, "default", files, pairs=False)
    assert dataset.name == files.training
    assert len(list(store.datasets.examples(dataset, "train"))) == 7
    assert len(list(store.datasets.examples(dataset, "validation"))) == 3
    assert len({example.id for example in store.datasets.examples(dataset)}) == 10
    assert dataset_of_files(store, "default", files, pairs=False) == dataset
    alone = dataset_of_files(store, "default", TrainingFiles(training=files.training), pairs=False)
    assert (alone.name, alone.version) == (dataset.name, 2)
    assert list(store.datasets.examples(alone, "validation")) == []


def test_a_prompt_with_its_completion_becomes_a_question_and_its_answer(store: Store) -> None:
    file = upload(store, [{"prompt": "say dog", "completion": "dog"}])
    dataset = dataset_of_files(store, "default", TrainingFiles(training=file), pairs=False)
    (example,) = store.datasets.examples(dataset)
    assert example.messages is not None
    assert [(turn.role, turn.content) for turn in example.messages] == [("user", "say dog"), ("assistant", "dog")]


@pytest.mark.parametrize(
    "names", [("preferred_output", "non_preferred_output"), ("preferred_completion", "non_preferred_completion")]
)
def test_preferences_are_read_by_their_newer_and_older_names(store: Store, names: tuple[str, str]) -> None:
    answers = {name: [{"role": "assistant", "content": name}] for name in names}
    row = {"input": {"messages": [{"role": "user", "content": "hello"}]}, **answers}
    dataset = dataset_of_files(store, "default", TrainingFiles(training=upload(store, [row])), pairs=True)
    (example,) = store.datasets.examples(dataset)
    assert example.messages is not None
    assert example.rejected is not None
    assert (example.messages[-1].content, example.rejected[-1].content) == names


@pytest.mark.parametrize(
    ("row", "pairs", "reason"),
    [
        ("{not json", False, "line 2: is not valid JSON"),
        ({"tools": [{"type": "function"}], **chats(1)[0]}, False, r"line 2: tools\[0\] has no function with a name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, False, "line 2: there is no assistant message"),
        ({"question": "?"}, False, "line 2: has no messages"),
        ({"prompt": "say", "completion": " "}, False, "line 2: completion must be a text that is not empty"),
        (chats(1)[0], True, "line 2: has no pair of answers"),
        ("\x00", False, "line 2"),
    ],
)
def test_every_wrong_row_is_named_with_its_line(store: Store, row: Any, pairs: bool, reason: str) -> None:
    good = chats(1)[0]
    if pairs:
        turn = {"role": "assistant", "content": "a"}
        good = {
            "input": {"messages": [{"role": "user", "content": "q"}]},
            "preferred_output": [turn],
            "non_preferred_output": [{**turn, "content": "b"}],
        }
    file = upload(store, [good, row])
    with pytest.raises(InputError, match=reason) as caught:
        dataset_of_files(store, "default", TrainingFiles(training=file), pairs=pairs)
    assert file in str(caught.value)
    assert store.datasets.versions(file) == []


def test_files_of_another_project_are_not_there(store: Store) -> None:
    file = upload(store, chats(), "acme")
    with pytest.raises(NotFoundError):
        dataset_of_files(store, "default", TrainingFiles(training=file), pairs=False)


def test_a_request_names_a_dataset_or_files() -> None:
    with pytest.raises(ValueError, match="name a dataset, or files"):
        TrainRequest(base="tiny-base")
    with pytest.raises(ValueError, match="name a dataset, or files"):
        TrainRequest(base="tiny-base", dataset="d", files=TrainingFiles(training="file-1"))


def job(store: Store, **values: Any) -> Run:
    return create_job(store, "default", JobRequest.model_validate({"model": "tiny-base", **values}))


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Return pairs of answers, which are right in themselves and not what method supervised learns from."""
    answers = ("preferred_output", "non_preferred_output")
    return [
        {"input": {"messages": chat["messages"][:1]}}
        | {name: [{"role": "assistant", "content": f"{name} {index}"}] for name in answers}
        for index, chat in enumerate(chats(count))
    ]


def test_a_job_whose_rows_do_not_suit_its_method_fails_and_says_which_file(store: Store) -> None:
    good, bad = upload(store, chats()), upload(store, pairs())
    for files, param in (((bad, None), "training_file"), ((good, bad), "validation_file")):
        asked = TrainRequest(base="tiny-base", files=TrainingFiles(training=files[0], validation=files[1]))
        run = submit(store, "train", asked)  # create_job looks at the first rows and would refuse it
        work(store, run.id)
        shown = job_object(store, store.runs.get(run.id))
        assert (shown["status"], shown["error"]["param"]) == ("failed", param)
        assert shown["error"]["code"] == f"invalid_{param}"
        assert "line 1: is a pair of answers" in shown["error"]["message"]


def test_a_file_whose_first_rows_do_not_suit_the_method_makes_no_job(store: Store) -> None:
    good, bad = upload(store, chats()), upload(store, pairs())
    for files, param in (((bad, None), "training_file"), ((good, bad), "validation_file")):
        with pytest.raises(ApiError, match="line 1: is a pair of answers") as caught:
            job(store, training_file=files[0], validation_file=files[1])
        assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, "invalid_file")


def test_a_file_that_was_found_wrong_on_arrival_makes_no_job(store: Store) -> None:
    good, bad = upload(store, chats()), upload(store, [chats(1)[0], {"messages": []}])
    for files, param in (((bad, None), "training_file"), ((good, bad), "validation_file")):
        with pytest.raises(ApiError, match="line 2: messages must be an array") as caught:
            job(store, training_file=files[0], validation_file=files[1])
        assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, "invalid_file")


def test_a_killed_worker_goes_on_and_leaves_one_dataset_one_file_and_the_last_epochs(store: Store) -> None:
    file = upload(store, chats(16))
    options = TrainingConfig(epochs=30, batch_size=4, lora_rank=4)
    request = TrainRequest(base="tiny-base", files=TrainingFiles(training=file), options=options, parity_prompts=0)
    run = submit(store, "train", request)
    process = start(store, run.id)
    deadline = time.monotonic() + 120
    while not store.checkpoints.page("default", parent=run.id).items:
        assert time.monotonic() < deadline, store.runs.events(run.id)
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert store.runs.get(run.id).status == "running"
    finished = follow(store, run.id)
    assert (finished.status, finished.attempts) == ("succeeded", 1), finished.error  # it came forward again
    assert finished.result is not None
    checkpoints = list(store.checkpoints.all("default", parent=run.id))
    assert [one.step for one in checkpoints] == [112, 116, 120]
    assert "valid_loss" not in checkpoints[-1].metrics
    assert len(store.datasets.versions(file)) == 1
    (results,) = finished.result["result_files"]
    rows = list(csv.DictReader(file_path(store, "default", results).read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 121))
    assert {row["valid_loss"] for row in rows} == {""}
    assert len(list(store.files.all("default"))) == 2
    model = store.models.get(finished.result["model"])
    assert model.training.best_step == 120
    assert model.training.best_valid_loss is None
    delete_model(store, "default", model.name)
    assert list(store.checkpoints.all("default", parent=run.id)) == []
    with pytest.raises(NotFoundError):
        served_folder(store, checkpoints[0].model, project="default")


def metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {"step": step, "steps": 3, "epoch": 1.0, "train_loss": 1.5, "learning_rate": 0.1}
    values |= {"gradient_norm": 1.0, "tokens_per_second": 1.0, "seconds_left": 0.0}
    return StepMetrics.model_validate(values | changes)


def test_the_steps_of_a_killed_run_are_each_in_the_result_file_once(store: Store) -> None:
    run = submit(store, "train", TrainRequest(base="tiny-base", dataset="d@1"), project="acme")
    folder = store.run_folder(run.id)
    with StepLog(folder) as log:
        log.write(metrics(1, train_metrics={"token_accuracy": 0.25}))
        log.write(metrics(2, train_loss=9.0))
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 3, "ste')  # a kill in the middle of a line
    with StepLog(folder) as log:
        log.write(metrics(2, valid_loss=float("inf"), valid_metrics={"token_accuracy": 0.5}))
    assert [step.step for step in read_steps(folder)] == [1, 2]
    store.artifacts.remove("files/none")
    id = add_result_file(store, run)
    assert add_result_file(store, run) == id
    assert file_path(store, "acme", id).read_text() == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.5,0.25,,\n2,1.5,,,0.5\n"
    )
    (file_of_project,) = store.files.all("acme")
    assert (file_of_project.filename, file_of_project.purpose) == ("step_metrics.csv", "fine-tune-results")


def test_a_result_file_whose_record_was_lost_to_a_kill_is_made_again(store: Store) -> None:
    run = submit(store, "train", TrainRequest(base="tiny-base", dataset="d@1"))
    id = add_result_file(store, run)
    store.files.remove("default", id)  # as if the process had died between the bytes and the record
    assert add_result_file(store, run) == id
    assert file_path(store, "default", id).is_file()


def test_a_checkpoint_that_cannot_be_merged_says_so(store: Store, tmp_path: Path) -> None:
    run = submit(store, "train", TrainRequest(base="tiny-base", dataset="d@1"))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "adapter_config.json").write_text("{}")
    made = keep_checkpoint(store, run, "tiny-base", "ft:tiny-base:local::1", weights, 5, {"step": 5.0})
    assert keep_checkpoint(store, run, "tiny-base", "ft:tiny-base:local::1", weights, 5, {}) == made
    (store.models.artifact_folder(made.adapter) / "adapter_config.json").write_text("[]")
    with pytest.raises(EngineError, match=r"could not be made ready for serving: .*adapter_config\.json has changed"):
        checkpoint_folder(store, made)
