"""Fine-tuning jobs through OpenAI's client: real workers train a tiny model, and everything they leave is asked for."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from luthier.jobs.launch import start, submit
from luthier.records.file import FilePurpose
from luthier.store.store import Store
from luthier.workflows.files import add_file, file_path
from luthier.workflows.material import TrainRequest
from luthier.workflows.models import pull
from tests.api.conftest import Live

WORDS = ("order", "message", "tweet", "model", "dog", "fox")
FINAL = ("succeeded", "failed", "cancelled")


def chats(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Return conversations whose answer is a word of the question."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {WORDS[index % 6]} number {index}"},
                {"role": "assistant", "content": WORDS[index % 6]},
            ]
        }
        for index in range(first, first + count)
    ]


def upload(store: Store, rows: list[Any], project: str = "acme", purpose: FilePurpose = "fine-tune") -> str:
    """Keep rows as a file of a project, and return its id."""
    content = "\n".join(json.dumps(row) for row in rows)
    return add_file(store, project, "rows.jsonl", purpose, io.BytesIO(content.encode())).id


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path) -> Iterator[Live]:
    """A service with keys, for the projects acme, other and default."""
    home = tmp_path_factory.mktemp("shop") / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    pull(store, str(tiny_encoder))
    store.close()
    live = Live(home)
    yield live
    live.close()


@pytest.fixture(scope="module")
def acme(shop: Live) -> openai.OpenAI:
    return shop.client(shop.key("acme"))


@pytest.fixture(scope="module")
def other(shop: Live) -> openai.OpenAI:
    return shop.client(shop.key("other"))


def wait(client: openai.OpenAI, job: str, until: Callable[[FineTuningJob], bool]) -> FineTuningJob:
    """Poll a job until something holds of it."""
    deadline = time.monotonic() + 120
    while not until(found := client.fine_tuning.jobs.retrieve(job)):
        assert time.monotonic() < deadline, found
        assert found.status not in FINAL, found
        time.sleep(0.05)
    return found


def run_id(job: str) -> str:
    return job.replace("ftjob-", "train-")


@dataclass(frozen=True)
class Life:
    """A job that succeeded, as it was created and as it is now."""

    created: FineTuningJob
    job: FineTuningJob


@pytest.fixture(scope="module")
def life(shop: Live, acme: openai.OpenAI) -> Life:
    """Create a job through the SDK and let a worker process execute it."""
    training, validation = upload(shop.store, chats(24)), upload(shop.store, chats(6, 24))
    hyperparameters: Any = {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 5.0}
    created = acme.fine_tuning.jobs.create(
        model="tiny-base",
        training_file=training,
        validation_file=validation,
        suffix="words",
        seed=7,
        metadata={"team": "blue"},
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    process = start(shop.store, run_id(created.id))
    process.wait()
    return Life(created, acme.fine_tuning.jobs.retrieve(created.id))


def test_a_job_is_queued_as_it_was_asked_for_and_ends_with_a_model(life: Life) -> None:
    created, job = life.created, life.job
    assert (created.status, created.fine_tuned_model, created.result_files) == ("queued", None, [])
    assert (created.seed, created.metadata) == (7, {"team": "blue"})
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny-base:local:words:")
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (4, 4)
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.trained_tokens
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert job.estimated_finish is None
    assert job.error is None


def test_events_come_newest_first_and_in_pages(life: Life, acme: openai.OpenAI) -> None:
    events = list(acme.fine_tuning.jobs.list_events(life.job.id, limit=4))
    assert [event.message for event in events[:2]] == [
        "The job has successfully completed",
        f"New fine-tuned model created: {life.job.fine_tuned_model}",
    ]
    assert events[-1].message == f"Created fine-tuning job: {life.job.id}"
    assert len({event.id for event in events}) == len(events)
    messages = {event.message for event in events}
    assert {"Fine-tuning job started", "Files validated", "Checkpoint created at step 24"} <= messages
    last = next(event for event in events if event.type == "metrics")
    data: Any = last.data
    assert (data["step"], data["total_steps"]) == (24, 24)
    assert data["full_valid_loss"] == data["valid_loss"]
    assert 0 <= data["train_mean_token_accuracy"] <= 1
    assert 0 <= data["valid_mean_token_accuracy"] <= 1


def test_the_last_epochs_are_checkpoints_with_their_metrics(life: Life, acme: openai.OpenAI) -> None:
    checkpoints = list(acme.fine_tuning.jobs.checkpoints.list(life.job.id, limit=2))
    assert [one.step_number for one in checkpoints] == [24, 18, 12]
    for one in checkpoints:
        assert one.fine_tuned_model_checkpoint == f"{life.job.fine_tuned_model}:ckpt-step-{one.step_number}"
        assert one.fine_tuning_job_id == life.job.id
        assert one.metrics.full_valid_loss is not None
        assert one.metrics.valid_mean_token_accuracy is not None
        assert one.metrics.train_loss is not None


def test_the_result_file_has_every_step(life: Life, shop: Live) -> None:
    (results,) = life.job.result_files
    file = shop.store.files.get("acme", results)
    assert (file.filename, file.purpose) == ("step_metrics.csv", "fine-tune-results")
    header, *rows = file_path(shop.store, "acme", results).read_text().splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 25))
    assert all(rows[23].split(","))
    assert rows[0].endswith(",,")


def ask(client: openai.OpenAI, model: str) -> str | None:
    messages: Any = [{"role": "user", "content": "say dog number 4"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    return answer.choices[0].message.content


def test_model_and_checkpoints_answer_and_a_project_shares_them(
    life: Life, acme: openai.OpenAI, other: openai.OpenAI, shop: Live
) -> None:
    model = life.job.fine_tuned_model
    assert model is not None
    checkpoint = f"{model}:ckpt-step-24"
    answer = ask(acme, model)
    assert answer in WORDS  # learned: an untrained model's answer is noise
    assert ask(acme, checkpoint) == answer
    assert acme.models.retrieve(checkpoint).id == checkpoint
    for name in (model, checkpoint):
        with pytest.raises(openai.NotFoundError):
            ask(other, name)
    permissions = acme.fine_tuning.checkpoints.permissions
    made = list(permissions.create(checkpoint, project_ids=["other", "third"]))
    assert {one.project_id for one in made} == {"other", "third"}
    again = list(permissions.create(checkpoint, project_ids=["other"]))
    assert {one.id for one in again} < {one.id for one in made}
    assert ask(other, checkpoint) == answer
    assert checkpoint in {one.id for one in other.models.list()}
    assert [one.id for one in permissions.list(checkpoint, limit=1, order="ascending")] == [one.id for one in made]
    (mine,) = permissions.list(checkpoint, project_id="other")
    assert permissions.delete(mine.id, fine_tuned_model_checkpoint=checkpoint).deleted
    for attempt in (lambda: ask(other, checkpoint), lambda: other.models.retrieve(checkpoint)):
        with pytest.raises(openai.NotFoundError):
            attempt()
    with pytest.raises(openai.NotFoundError):
        other.fine_tuning.checkpoints.permissions.create(checkpoint, project_ids=["other"])
    with pytest.raises(openai.NotFoundError):
        permissions.delete("cp_none", fine_tuned_model_checkpoint=checkpoint)
    with pytest.raises(openai.BadRequestError, match="has this model already"):
        permissions.create(checkpoint, project_ids=["acme"])
    writer = shop.client(shop.key("acme", "write"))
    with pytest.raises(openai.PermissionDeniedError):
        writer.fine_tuning.checkpoints.permissions.create(checkpoint, project_ids=["other"])


def test_another_project_sees_nothing_of_a_job(life: Life, other: openai.OpenAI) -> None:
    jobs = other.fine_tuning.jobs
    assert list(jobs.list()) == []
    attempts: list[Callable[[], Any]] = [
        lambda: jobs.retrieve(life.job.id),
        lambda: jobs.cancel(life.job.id),
        lambda: jobs.pause(life.job.id),
        lambda: jobs.resume(life.job.id),
        lambda: jobs.list_events(life.job.id),
        lambda: jobs.checkpoints.list(life.job.id),
        lambda: jobs.list(after=life.job.id),
        lambda: jobs.create(model="tiny-base", training_file=life.job.training_file),
        lambda: jobs.create(model=str(life.job.fine_tuned_model), training_file="file-x"),
    ]
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError):
            attempt()


def test_a_finished_job_can_be_neither_stopped_nor_resumed(life: Life, acme: openai.OpenAI) -> None:
    for attempt in (acme.fine_tuning.jobs.cancel, acme.fine_tuning.jobs.pause, acme.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError) as caught:
            attempt(life.job.id)
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_running_job_is_paused_resumed_and_cancelled(shop: Live, acme: openai.OpenAI) -> None:
    file = upload(shop.store, chats(24))
    hyperparameters: Any = {"n_epochs": 50, "batch_size": 1}
    job = acme.fine_tuning.jobs.create(model="tiny-base", training_file=file, hyperparameters=hyperparameters)
    process = start(shop.store, run_id(job.id))
    running = wait(acme, job.id, lambda found: bool(acme.fine_tuning.jobs.checkpoints.list(found.id).data))
    assert running.status == "running"
    assert running.estimated_finish is not None
    assert running.hyperparameters.n_epochs == 50
    acme.fine_tuning.jobs.pause(job.id)
    process.wait()
    paused: Any = acme.fine_tuning.jobs.retrieve(job.id)
    assert (paused.status, paused.x_paused) == ("queued", True)
    with pytest.raises(openai.ConflictError, match="already"):
        acme.fine_tuning.jobs.pause(job.id)
    checkpoint = acme.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert isinstance(ask(acme, checkpoint.fine_tuned_model_checkpoint), str)
    assert acme.models.delete(checkpoint.fine_tuned_model_checkpoint).deleted
    with pytest.raises(openai.NotFoundError):
        ask(acme, checkpoint.fine_tuned_model_checkpoint)
    resumed: Any = acme.fine_tuning.jobs.resume(job.id)
    assert (resumed.status, resumed.x_paused) == ("queued", False)
    with pytest.raises(openai.ConflictError, match="only a paused or failed one"):
        acme.fine_tuning.jobs.resume(job.id)
    assert acme.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="is cancelled; only a paused or failed one"):
        acme.fine_tuning.jobs.resume(job.id)
    messages = [event.message for event in acme.fine_tuning.jobs.list_events(job.id)]
    assert messages[:2] == ["The job was asked to stop for good", "The job was resumed"]
    assert "The job was asked to pause" in messages


def test_preferences_are_learned_by_dpo_from_a_stand_in(
    shop: Live, acme: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_STAND_INS", "gpt-4o*=tiny-base")
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"say {WORDS[index % 6]} {index}"}]},
            "preferred_output": [{"role": "assistant", "content": WORDS[index % 6]}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for index in range(6)
    ]
    hyperparameters: Any = {"n_epochs": 1, "beta": 0.2, "batch_size": "auto"}
    job = acme.fine_tuning.jobs.create(
        model="gpt-4o-mini",
        training_file=upload(shop.store, rows),
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    )
    assert job.model == "tiny-base"
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert (job.method.dpo.hyperparameters.beta, job.method.dpo.hyperparameters.batch_size) == (0.2, "auto")
    run = shop.store.runs.get(run_id(job.id))
    options = TrainRequest.model_validate(run.config).options
    assert (options.method, options.dpo.beta, options.epochs) == ("dpo", 0.2, 1)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "tiny-bse"}, 404, "model"),
        ({"model": "tiny-encoder"}, 400, "model"),
        ({"model": "ft:tiny-base:local::none"}, 404, "model"),
        ({"model": ""}, 400, "model"),
        ({"model": 3}, 400, "model"),
        ({"training_file": "file-none"}, 404, "training_file"),
        ({"training_file": "../../etc/passwd"}, 404, "training_file"),
        ({"training_file": None}, 400, "training_file"),
        ({"validation_file": "file-none"}, 404, "validation_file"),
        ({"suffix": "a b"}, 400, "suffix"),
        ({"suffix": "a\n"}, 400, "suffix"),
        ({"suffix": "x" * 65}, 400, "suffix"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 2**31}, 400, "seed"),
        ({"seed": "7"}, 400, "seed"),
        ({"metadata": {"k": 1}}, 400, "metadata.k"),
        ({"hyperparameters": {"n_epochs": 51}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 10**400}}, 400, None),
        ({"hyperparameters": {"lora_rank": 4}}, 400, "hyperparameters.lora_rank"),
        ({"hyperparameters": {"beta": 0.1}}, 400, "hyperparameters.beta"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, 400, "method.type"),
        ({"method": {"type": "sft"}}, 400, "method.type"),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "method"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, 400, "integrations[0].type"),
        ({"integrations": [{"type": "mlflow"}]}, 400, None),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_field(
    shop: Live, acme: openai.OpenAI, changes: dict[str, Any], status: int, param: str | None
) -> None:
    body = {"model": "tiny-base", "training_file": upload(shop.store, chats(2)), **changes}
    response = httpx.post(
        f"{shop.url}/v1/fine_tuning/jobs",
        content=json.dumps(body),
        headers={"authorization": f"Bearer {acme.api_key}", "content-type": "application/json"},
    )
    error = response.json()["error"]
    assert response.status_code == status, error
    assert param is None or error["param"] == param, error


def test_files_that_do_not_fit_are_refused_with_their_details(shop: Live, acme: openai.OpenAI) -> None:
    wrong = upload(shop.store, chats(2), purpose="batch")
    with pytest.raises(openai.BadRequestError, match=r"rows\.jsonl.*purpose 'batch'"):
        acme.fine_tuning.jobs.create(model="tiny-base", training_file=wrong)
    broken = upload(shop.store, chats(2))
    shop.store.files.change(
        "acme", broken, lambda file: file.model_copy(update={"status": "error", "status_details": "line 3: bad"})
    )
    with pytest.raises(openai.BadRequestError, match="line 3: bad") as caught:
        acme.fine_tuning.jobs.create(model="tiny-base", training_file=broken)
    assert caught.value.param == "training_file"
    with pytest.raises(openai.BadRequestError, match="It has 1 example, and at least 2 are needed"):
        acme.fine_tuning.jobs.create(model="tiny-base", training_file=upload(shop.store, chats(1)))
    with pytest.raises(openai.BadRequestError, match="line 1: ") as caught:
        acme.fine_tuning.jobs.create(
            model="tiny-base", training_file=upload(shop.store, chats(2)), method={"type": "dpo", "dpo": {}}
        )
    assert caught.value.param == "training_file"
    gone = upload(shop.store, chats(2))
    shop.store.files.change("acme", gone, lambda file: file.model_copy(update={"expires_at": 1}))
    with pytest.raises(openai.NotFoundError, match="expired"):
        acme.fine_tuning.jobs.create(model="tiny-base", training_file=gone)


def test_a_job_that_is_validated_with_what_it_learns_says_so(shop: Live, acme: openai.OpenAI) -> None:
    file = upload(shop.store, chats(2))
    job = acme.fine_tuning.jobs.create(model="tiny-base", training_file=file, validation_file=file)
    (event,) = [event for event in acme.fine_tuning.jobs.list_events(job.id) if event.level == "warn"]
    assert "learned by heart" in event.message
    acme.fine_tuning.jobs.cancel(job.id)


def test_a_model_that_is_not_here_is_told_apart_from_one_that_nobody_knows(
    shop: Live, acme: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: str) -> str:
        with pytest.raises(openai.NotFoundError) as caught:
            acme.fine_tuning.jobs.create(model=model, training_file=upload(shop.store, chats(2)))
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
        return caught.value.message

    assert "luthier model pull smollm2-360m" in refused("smollm2-360m")
    assert "The model 'tiny-bas' does not exist. Did you mean 'tiny-base'?" in refused("tiny-bas")
    assert "LUTHIER_STAND_INS lets a base answer" in refused("gpt-4o-mini")
    monkeypatch.setenv("LUTHIER_STAND_INS", "gpt-*=smollm2-360m")
    found = refused("gpt-4o-mini")
    assert "lets 'smollm2-360m' answer for 'gpt-4o-mini'" in found
    assert "luthier model pull smollm2-360m" in found


def test_jobs_are_listed_in_pages_and_by_their_labels(shop: Live) -> None:
    client = shop.client(shop.key("lists"))
    file = upload(shop.store, chats(2), "lists")
    labels: list[Any] = [{"team": "a", 'k"1': "x"}, {"team": "b"}, None, {}]
    made = [
        client.fine_tuning.jobs.create(model="tiny-base", training_file=file, metadata=label).id for label in labels
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "a"})] == made[:1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={'k"1': "x"})] == made[:1]
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == made[:1:-1]
    for wrong in (0, -1, 101, "x"):
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.list(limit=wrong)  # type: ignore[arg-type]
    for after in ("ftjob-none", "train-1", "ftevent-1-2", "x" * 5000):
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.list(after=after)
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.list_events(made[0], after=after)
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.checkpoints.list(made[0], after=after)


def test_a_run_of_the_command_line_is_a_job_of_the_default_project(shop: Live) -> None:
    client = shop.client(shop.key())
    run = submit(shop.store, "train", TrainRequest(base="tiny-base", dataset="questions@2"))
    submit(shop.store, "evaluate", TrainRequest(base="tiny-base", dataset="questions@2"))
    (job,) = client.fine_tuning.jobs.list()
    assert job.id == run.id.replace("train-", "ftjob-")
    assert (job.training_file, job.validation_file, job.status) == ("questions@2", None, "queued")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert next(iter(client.fine_tuning.jobs.list_events(job.id))).message == "The job was asked to stop for good"
