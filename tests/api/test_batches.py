"""A file of requests in, a file of answers out: in order, with counts on the way, whatever dies in between."""

from __future__ import annotations

import io
import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from luthier.errors import ConflictError
from luthier.jobs.launch import submit
from luthier.jobs.resident import MAX_ATTEMPTS
from luthier.jobs.resident_context import Answer
from luthier.records.batch import BatchRequest
from luthier.records.example import Example
from luthier.store.store import Store
from luthier.workflows import batch_execution
from luthier.workflows.batch_spool import Row
from luthier.workflows.batches import WINDOW_SECONDS, batch_id, batch_object
from luthier.workflows.deliveries import EVENTS
from luthier.workflows.models import pull
from luthier.workflows.serving import model_pool
from tests.api.conftest import Live
from tests.cli.test_up import Up

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
DEADLINE_SECONDS = 120
HELLO: dict[str, Any] = {"model": "tiny-base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, endless_model: Path) -> Iterator[Live]:
    """A service that executes batches, with the models ``tiny-base`` and ``endless``."""
    home = tmp_path_factory.mktemp("live") / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    live = Live(home, model_pool(store, {"endless": endless_model}), processes=1)
    yield live
    live.close()
    store.close()


def line(custom_id: str, body: dict[str, Any] = HELLO, **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes


def upload(client: openai.OpenAI, lines: list[Any]) -> str:
    content = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    return client.files.create(file=("requests.jsonl", io.BytesIO(content.encode())), purpose="batch").id


def begin(client: openai.OpenAI, lines: list[Any], **options: Any) -> Batch:
    given = {"input_file_id": upload(client, lines), "endpoint": CHAT, "completion_window": "24h"} | options
    return client.batches.create(**given)


def until(client: openai.OpenAI, batch: str, is_so: Callable[[Batch], bool]) -> Batch:
    end = time.monotonic() + DEADLINE_SECONDS
    while not is_so(found := client.batches.retrieve(batch)):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def ended(client: openai.OpenAI, batch: str) -> Batch:
    return until(client, batch, lambda it: it.status in ENDED)


def rows_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def counts_of(batch: Batch) -> tuple[int, int, int]:
    counts = batch.request_counts
    assert counts is not None
    return counts.total, counts.completed, counts.failed


def test_answers_come_in_the_order_of_the_requests_and_errors_in_a_file_of_their_own(live: Live) -> None:
    client = live.client()
    lines = [line(f"line-{n}", {**HELLO, "max_tokens": 1 + (7 * n) % 11, "temperature": 0}) for n in range(70)]
    lines[3] = line("wrong", {**HELLO, "temperature": 9})
    lines[5] = line("nobody", {**HELLO, "model": "nobody"})
    made = begin(
        client, lines, metadata={"for": "test"}, output_expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (made.status, made.metadata, made.endpoint) == ("validating", {"for": "test"}, CHAT)
    done = ended(client, made.id)
    assert (done.status, counts_of(done)) == ("completed", (70, 68, 2))
    moments = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert moments == sorted(moments, key=lambda moment: moment or 0)
    assert done.expires_at == done.created_at + WINDOW_SECONDS
    answers = rows_of(client, done.output_file_id)
    assert [one["custom_id"] for one in answers] == [f"line-{n}" for n in range(70) if n not in (3, 5)]
    assert len({one["id"] for one in answers}) == 68
    first = answers[1]["response"]
    assert (first["status_code"], first["body"]["usage"]["completion_tokens"]) == (200, 8)
    assert first["request_id"].startswith("req_")
    wrong, nobody = rows_of(client, done.error_file_id)
    assert (wrong["custom_id"], wrong["response"]["status_code"], wrong["error"]) == ("wrong", 400, None)
    assert wrong["response"]["body"]["error"]["param"] == "temperature"
    assert nobody["response"]["body"]["error"]["code"] == "model_not_found"
    file = client.files.retrieve(done.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{made.id}_output.jsonl")
    assert file.expires_at == file.created_at + 3600
    assert done.usage is not None
    assert done.usage.output_tokens == sum(one["response"]["body"]["usage"]["completion_tokens"] for one in answers)
    assert not (live.store.run_folder(made.id.replace("_", "-", 1)) / "answers.jsonl").exists()


def test_a_batch_whose_lines_all_name_one_model_names_it_and_its_file_may_be_deleted_meanwhile(live: Live) -> None:
    client = live.client()
    long = {**HELLO, "model": "endless", "max_tokens": 200, "temperature": 0}
    made = begin(client, [line(f"line-{n}", long) for n in range(40)])
    until(client, made.id, lambda it: it.in_progress_at is not None)
    client.files.delete(made.input_file_id)
    done = ended(client, made.id)
    assert (done.status, done.model, counts_of(done)) == ("completed", "endless", (40, 40, 0))
    assert done.error_file_id is None


def test_what_is_stored_inside_a_batch_is_stored(live: Live) -> None:
    client = live.client()
    body = {**HELLO, "store": True, "metadata": {"batch": "yes"}}
    done = ended(client, begin(client, [line("one", body), line("two", body)]).id)
    ids = {row["response"]["body"]["id"] for row in rows_of(client, done.output_file_id)}
    assert {one.id for one in client.chat.completions.list(metadata={"batch": "yes"})} == ids


def test_a_broken_file_fails_the_batch_and_names_its_lines(live: Live) -> None:
    client = live.client()
    lines = [
        line("a"),
        line("a"),
        "{not json",
        line("b", method="GET"),
        line("c", url="/v1/embeddings"),
        line("d", url="/v1/files"),
        line("e", {**HELLO, "stream": True}),
        line("", body="text"),
    ]
    done = ended(client, begin(client, lines).id)
    assert done.status == "failed"
    assert done.failed_at is not None
    assert done.errors is not None
    assert done.errors.data is not None
    found = {(problem.line, problem.param) for problem in done.errors.data}
    assert found == {
        (2, "custom_id"),
        (3, None),
        (4, "method"),
        (5, "url"),
        (6, "url"),
        (7, "body.stream"),
        (8, "custom_id"),
    }
    assert "was there before" in (done.errors.data[0].message or "")
    assert done.output_file_id is None


def test_an_empty_file_and_one_that_is_gone_fail_the_batch(live: Live) -> None:
    client = live.client()
    done = ended(client, begin(client, [""]).id)
    assert done.errors is not None
    assert [problem.code for problem in done.errors.data or ()] == ["empty_file"]
    run = submit(live.store, "batch", BatchRequest(input_file_id="file-gone", endpoint=CHAT))
    done = ended(client, batch_id(run.id))
    assert done.errors is not None
    assert [problem.code for problem in done.errors.data or ()] == ["file_not_found"]


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"input_file_id": "file-nobody"}, openai.NotFoundError, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, openai.BadRequestError, "endpoint"),
        ({"completion_window": "1h"}, openai.BadRequestError, "completion_window"),
        ({"metadata": {"a": 1}}, openai.BadRequestError, "metadata.a"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            openai.BadRequestError,
            "output_expires_after.seconds",
        ),
    ],
)
def test_a_request_that_breaks_a_rule_is_refused_by_name(
    live: Live, change: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        begin(live.client(), [line("a")], **change)
    assert caught.value.param == param  # type: ignore[attr-defined]


def test_a_file_for_something_else_is_refused(live: Live) -> None:
    client = live.client()
    file = client.files.create(file=("a.txt", io.BytesIO(b"hello")), purpose="user_data")
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert caught.value.code == "invalid_file"


def test_a_cancelled_batch_keeps_what_it_has(live: Live) -> None:
    client = live.client()
    short, long = {**HELLO, "temperature": 0}, {**HELLO, "model": "endless", "max_tokens": 1900}
    made = begin(client, [line(f"short-{n}", short) for n in range(40)] + [line(f"long-{n}", long) for n in range(500)])
    until(client, made.id, lambda it: counts_of(it)[1] >= 40)
    asked = client.batches.cancel(made.id)
    assert asked.status in ("cancelling", "cancelled")
    assert asked.cancelling_at is not None
    done = ended(client, made.id)
    assert done.status == "cancelled"
    assert done.cancelled_at is not None
    answers = rows_of(client, done.output_file_id)
    assert len(answers) == counts_of(done)[1] < 540
    assert {f"short-{n}" for n in range(40)} <= {one["custom_id"] for one in answers}
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(made.id)
    assert not any(loaded.engine.in_flight for loaded in live.service.pool.loaded)


def test_batches_are_listed_newest_first_and_page_by_page(live: Live) -> None:
    client = live.client()
    ids = [begin(client, [line("a")]).id for _ in range(3)]
    listed = [one.id for one in client.batches.list(limit=2)]
    assert [id for id in listed if id in ids] == ids[::-1]
    assert next(one.id for one in client.batches.list(after=ids[1], limit=1)) == ids[0]
    for id in ids:
        ended(client, id)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_nobody")


def test_a_batch_that_is_too_late_expires_with_what_it_has(live: Live) -> None:
    client = live.client()
    long = {**HELLO, "model": "endless", "max_tokens": 1900}
    made = begin(client, [line("short"), *(line(f"long-{n}", long) for n in range(300))])
    until(client, made.id, lambda it: counts_of(it)[1] >= 1)
    run_id = made.id.replace("_", "-", 1)
    store = live.store
    store.runs.request(run_id, "pause")
    end = time.monotonic() + DEADLINE_SECONDS
    while store.runs.get(run_id).status != "paused":
        assert time.monotonic() < end
        time.sleep(0.05)
    with sqlite3.connect(store.home / "luthier.db") as database:
        database.execute("UPDATE runs SET created_at = created_at - ? WHERE id = ?", (WINDOW_SECONDS + 60, run_id))
    store.runs.requeue(run_id)
    done = ended(client, made.id)
    assert (done.status, done.expired_at is not None) == ("expired", True)
    total, completed, failed = counts_of(done)
    assert (total, completed + failed) == (301, 301)
    answers, errors = rows_of(client, done.output_file_id), rows_of(client, done.error_file_id)
    assert (len(answers), len(errors)) == (completed, failed)
    assert errors[0]["error"]["code"] == "batch_expired"
    assert errors[0]["response"] is None
    assert EVENTS["batch"](store, store.runs.get(run_id)) == ("batch.expired", made.id)


def begun(home: Path, endless_model: Path) -> tuple[str, set[str]]:
    """Have a service answer a part of a batch and end, so that it is back in the queue; say which and what it has."""
    live = Live(home, model_pool(Store(home), {"endless": endless_model}), processes=1)
    try:
        client = live.client()
        lines = [line(f"short-{n}", {**HELLO, "model": "endless"}) for n in range(40)]
        lines += [line(f"long-{n}", {**HELLO, "model": "endless", "max_tokens": 1900}) for n in range(200)]
        made = begin(client, lines)
        until(client, made.id, lambda it: counts_of(it)[1] >= 40)
    finally:
        live.close()
    store = Store(home)
    run = store.runs.get(made.id.replace("_", "-", 1))
    assert (run.status, run.attempts) == ("queued", 0)
    spool = store.run_folder(run.id) / "answers.jsonl"
    answered = {json.loads(text.partition("\t")[2])["custom_id"] for text in spool.read_text().splitlines()}
    store.close()
    return made.id, answered


@pytest.mark.parametrize("where", ["in the queue", "paused"])
def test_a_batch_that_nothing_runs_keeps_what_it_has_when_it_is_cancelled(
    tmp_path: Path, endless_model: Path, where: str
) -> None:
    home = tmp_path / "home"
    batch, answered = begun(home, endless_model)
    run_id = batch.replace("_", "-", 1)
    live = Live(home, model_pool(Store(home), {"endless": endless_model}), processes=1, resident_runs=0)
    try:
        client = live.client()
        if where == "paused":
            live.store.runs.request(run_id, "pause")
        before = client.batches.retrieve(batch)
        assert (before.status, before.output_file_id) == ("in_progress", None)
        assert client.batches.cancel(batch).status in ("cancelling", "cancelled")
        done = ended(client, batch)
        assert (done.status, counts_of(done)) == ("cancelled", (240, len(answered), 0))
        assert {one["custom_id"] for one in rows_of(client, done.output_file_id)} == answered
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch)
    finally:
        live.close()


def test_a_batch_that_is_cancelled_while_no_server_runs_waits_for_one(tmp_path: Path, endless_model: Path) -> None:
    home = tmp_path / "home"
    batch, answered = begun(home, endless_model)
    run_id = batch.replace("_", "-", 1)
    store = Store(home)
    asked = store.runs.request(run_id, "cancel")
    assert (asked.status, asked.request, batch_object(store, asked)["status"]) == ("queued", "cancel", "cancelling")
    with pytest.raises(ConflictError, match="waits to be cancelled; it cannot be paused"):
        store.runs.request(run_id, "pause")
    with pytest.raises(ConflictError, match="waits to be cancelled; it cannot be resumed"):
        store.runs.requeue(run_id)
    live = Live(home, model_pool(store, {"endless": endless_model}), processes=1)
    try:
        done = ended(live.client(), batch)
        assert done.status == "cancelled"
        assert {one["custom_id"] for one in rows_of(live.client(), done.output_file_id)} == answered
    finally:
        live.close()
    store.close()


def test_a_batch_whose_servers_died_too_often_fails_with_what_it_has_and_can_be_resumed(
    tmp_path: Path, endless_model: Path
) -> None:
    home = tmp_path / "home"
    batch, answered = begun(home, endless_model)
    run_id = batch.replace("_", "-", 1)
    store = Store(home)
    for attempt in range(MAX_ATTEMPTS):
        taken = store.runs.claim(f"elsewhere/{attempt}/1.00", -1, lambda owner: False, run_id, max_attempts=99)
        assert taken is not None
    live = Live(home, model_pool(store, {"endless": endless_model}), processes=1)
    try:
        client = live.client()
        failed = ended(client, batch)
        assert (failed.status, counts_of(failed)) == ("failed", (240, len(answered), 0))
        assert failed.errors is not None
        assert [one.message for one in failed.errors.data or ()] == ["The server that executed it died 10 times."]
        assert {one["custom_id"] for one in rows_of(client, failed.output_file_id)} == answered
        store.runs.requeue(run_id)
        until(client, batch, lambda it: counts_of(it)[1] > len(answered))
        client.batches.cancel(batch)
        done = ended(client, batch)
        assert done.status == "cancelled"
        assert done.output_file_id != failed.output_file_id
        assert len(rows_of(client, done.output_file_id)) == counts_of(done)[1] > len(answered)
    finally:
        live.close()
    store.close()


def test_a_batch_that_fails_on_a_surprise_has_files_of_what_was_answered(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_row = batch_execution._row

    def break_down(line: Example, answer: Answer) -> Row:
        if line.fields["custom_id"] == "surprise":
            raise ZeroDivisionError("a surprise")
        return make_row(line, answer)

    monkeypatch.setattr(batch_execution, "_row", break_down)
    client = live.client()
    lines = [line(f"line-{n}", {**HELLO, "model": "endless"}) for n in range(40)]
    made = begin(client, [*lines, line("surprise", {**HELLO, "model": "endless", "max_tokens": 300})])
    failed = ended(client, made.id)
    assert failed.status == "failed"
    assert failed.errors is not None
    assert "a surprise" in ((failed.errors.data or [])[0].message or "")
    assert 0 < len(rows_of(client, failed.output_file_id)) == counts_of(failed)[1] <= 40
    monkeypatch.undo()
    live.store.runs.requeue(made.id.replace("_", "-", 1))
    done = ended(client, made.id)
    assert (done.status, counts_of(done)) == ("completed", (41, 41, 0))
    assert len(rows_of(client, done.output_file_id)) == 41


def test_a_killed_server_loses_no_answer_and_asks_for_none_twice(tmp_path: Path, tiny_base: Path) -> None:
    home = tmp_path / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    first = Up(home)
    client = first.client()
    body = {**HELLO, "max_tokens": 20, "temperature": 0, "store": True}
    lines = [line(f"line-{n}", {**body, "messages": [{"role": "user", "content": f"number {n}"}]}) for n in range(240)]
    stream = client.chat.completions.create(**{**body, "stream": True, "metadata": {"of": "stream"}})
    (streamed,) = {chunk.id for chunk in stream}
    made = begin(client, lines)
    spool = store.run_folder(made.id.replace("_", "-", 1)) / "answers.jsonl"
    end = time.monotonic() + DEADLINE_SECONDS
    while not spool.exists() or spool.read_bytes().count(b"\n") < 40:
        assert time.monotonic() < end
        time.sleep(0.005)
    first.stop(signal.SIGKILL)
    kept = [json.loads(text.partition("\t")[2]) for text in spool.read_text().splitlines() if text.endswith("}")]
    assert 40 <= len(kept) < 240
    second = Up(home)
    client = second.client()
    assert counts_of(client.batches.retrieve(made.id))[0] == 240
    done = ended(client, made.id)
    assert (done.status, counts_of(done)) == ("completed", (240, 240, 0)), done.errors
    answers = rows_of(client, done.output_file_id)
    assert [one["custom_id"] for one in answers] == [one["custom_id"] for one in lines]
    by_id = {one["id"]: one for one in answers}
    assert all(by_id[one["id"]] == one for one in kept)  # what was answered before the kill was not asked again
    assert client.chat.completions.retrieve(streamed).metadata == {"of": "stream"}
    logged = {one.id for one in client.chat.completions.list(limit=100)}
    assert {one["response"]["body"]["id"] for one in answers} <= logged
    assert len(logged) <= 240 + 1 + 32
    assert second.stop() == 0
    store.close()
