from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import openai
import pytest
from openai.types import Upload

from luthier.api.service import Limits
from luthier.jobs.worker import this_owner
from luthier.records.stored import now
from luthier.records.upload import UploadClaim
from luthier.workflows.files import add_file, expire_files
from luthier.workflows.uploads import expire_uploads
from tests.api.conftest import Live
from tests.cli.test_up import Up

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "hi"}]},
    "preferred_output": [{"role": "assistant", "content": "hello"}],
    "non_preferred_output": [{"role": "assistant", "content": "what"}],
}
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny-base"}}


def lines(*rows: object) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def test_a_file_is_kept_listed_read_and_deleted(live: Live) -> None:
    client = live.client()
    content = lines(CHAT, CHAT)
    made = client.files.create(
        file=("../../etc/train.jsonl", content),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.filename, made.bytes, made.status) == ("../../etc/train.jsonl", len(content), "processed")
    assert made.expires_at == made.created_at + 3600
    other = client.files.create(file=("a.txt", b"x"), purpose="user_data")
    assert [file.id for file in client.files.list(limit=1)] == [other.id, made.id]
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [made.id]
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert client.files.delete(made.id).deleted
    for gone in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)
    client.files.delete(other.id)
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-nobody")


@pytest.mark.parametrize(
    ("purpose", "content", "found"),
    [
        ("fine-tune", lines(CHAT, {"messages": []}, b"{nope"), "2 of 3 lines cannot be used:\nline 2: "),
        ("fine-tune", lines(CHAT, PAIR), "line 2: is a pair of answers"),
        ("fine-tune", lines({"prompt": "a", "completion": ""}), "completion must be a text"),
        ("fine-tune", b"", "The file has no lines."),
        ("fine-tune", b'{"messages": "\xff"}', "line 1: "),
        ("fine-tune", lines({"text": "x"}), "has no messages"),
        ("batch", lines(REQUEST, REQUEST), "line 2: custom_id 'a' was there before"),
        ("batch", lines(REQUEST | {"url": "/v1/files", "method": "GET"}), "method must be 'POST'"),
        ("batch", lines(REQUEST | {"body": {"stream": True}}), "a batch has no streams"),
        ("evals", lines([1]), "line 1: is an array"),
        ("evals", lines({"item": {}}, {"country": "x"}), "line 2: item: Field required"),
        ("evals", lines({"item": 5}), "line 1: item: Input should be a valid dictionary"),
    ],
)
def test_a_file_that_does_not_fit_its_purpose_says_why(live: Live, purpose: str, content: bytes, found: str) -> None:
    file = live.client().files.create(file=("x.jsonl", content), purpose=purpose)
    assert file.status == "error"
    assert found in (file.status_details or "")


@pytest.mark.parametrize(
    ("purpose", "content"),
    [
        ("fine-tune", lines(PAIR, PAIR)),
        ("fine-tune", lines({"prompt": "a", "completion": "b"})),
        ("batch", lines(REQUEST, REQUEST | {"custom_id": "b"})),
        ("evals", lines({"item": {"q": 1}})),
    ],
)
def test_a_file_that_fits_its_purpose_is_processed(live: Live, purpose: str, content: bytes) -> None:
    file = live.client().files.create(file=("x.jsonl", content), purpose=purpose)
    assert (file.status, file.status_details) == ("processed", None)


def test_a_file_is_of_its_project_alone(start_live: Callable[..., Live]) -> None:
    live = start_live()
    acme, other = live.client(live.key("acme")), live.client(live.key("other"))
    file = acme.files.create(file=("a.txt", b"x"), purpose="user_data")
    assert list(other.files.list()) == []
    for call in (other.files.retrieve, other.files.delete, other.files.content):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    reader = live.client(live.key("acme", "read"))
    assert reader.files.content(file.id).text == "x"
    with pytest.raises(openai.PermissionDeniedError):
        reader.files.delete(file.id)


def test_wrong_purposes_names_and_sizes_are_told(start_live: Callable[..., Live]) -> None:
    client = start_live(limits=Limits(file_bytes=1000)).client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("a", b"x"), purpose="nonsense")  # type: ignore[arg-type]
    assert caught.value.param == "purpose"
    with pytest.raises(openai.BadRequestError, match="1 to 255 letters"):
        client.files.create(file=("n" * 300, b"x"), purpose="user_data")
    for size in (1001, 200_000):
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=("a", b"x" * size), purpose="user_data")
        assert refused.value.status_code == 413
    assert list(client.files.list()) == []


def test_an_expired_file_is_gone_and_then_deleted(start_live: Callable[..., Live]) -> None:
    live = start_live()
    file = add_file(live.store, "default", "a", "user_data", io.BytesIO(b"x"), expires_after_seconds=3600)
    live.store.files.change("default", file.id, lambda it: it.model_copy(update={"expires_at": now() - 1}))
    with pytest.raises(openai.NotFoundError, match="expired"):
        live.client().files.retrieve(file.id)
    expire_files(live.store)
    assert list(live.store.files.all("default")) == []
    assert not (live.store.artifacts.root / "files" / file.id).exists()


def test_result_files_are_plain_or_as_openai_gives_them(live: Live) -> None:
    file = add_file(live.store, "default", "step_metrics.csv", "fine-tune-results", io.BytesIO(b"step,train_loss\n"))
    client = live.client()
    assert client.files.content(file.id).text == "step,train_loss\n"
    encoded = client.files.content(file.id, extra_query={"encoding": "base64"}).read()
    assert base64.b64decode(encoded) == b"step,train_loss\n"


# Uploads


def test_a_file_comes_in_parts(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(lines(*[CHAT] * 500))
    upload = live.client().uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=10_000
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert live.client().files.content(upload.file.id).read() == path.read_bytes()
    assert list(live.store.upload_parts.all("default")) == []
    assert list((live.store.artifacts.root / "uploads").iterdir()) == []


def test_the_order_of_the_parts_is_that_of_their_ids_at_the_end(live: Live) -> None:
    uploads = live.client().uploads
    upload = uploads.create(filename="x", purpose="user_data", bytes=6, mime_type="text/plain")
    one, two = (uploads.parts.create(upload.id, data=data).id for data in (b"one", b"two"))
    done = uploads.complete(
        upload.id, part_ids=[two, one], md5=hashlib.md5(b"twoone", usedforsecurity=False).hexdigest()
    )
    assert done.status == "completed"


def test_wrong_parts_and_states_are_told(live: Live) -> None:
    uploads = live.client().uploads
    upload = uploads.create(filename="x", purpose="user_data", bytes=6, mime_type="text/plain")
    one = uploads.parts.create(upload.id, data=b"one").id
    for part_ids, md5, about in (
        ([one], None, "3 bytes, and 6 were announced"),
        ([one, one], None, "named twice"),
        (["part_nobody"], None, "not a part"),
    ):
        with pytest.raises(openai.BadRequestError, match=about):
            uploads.complete(upload.id, part_ids=part_ids, md5=md5 or openai.omit)
    two = uploads.parts.create(upload.id, data=b"two").id
    with pytest.raises(openai.BadRequestError, match="MD5"):
        uploads.complete(upload.id, part_ids=[one, two], md5="0" * 32)
    assert uploads.cancel(upload.id).status == "cancelled"
    for call in (
        lambda: uploads.parts.create(upload.id, data=b"x"),
        lambda: uploads.complete(upload.id, part_ids=[one, two]),
        lambda: uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.ConflictError, match="cancelled"):
            call()
    with pytest.raises(openai.APIStatusError) as refused:
        uploads.create(filename="x", purpose="user_data", bytes=10**12, mime_type="text/plain")
    assert refused.value.status_code == 413


def begin_large(client: openai.OpenAI, rows: int) -> tuple[str, str, bytes]:
    """Upload a file in one part; return the ids of the upload and its part, and the file."""
    content = lines(*[CHAT] * rows)
    upload = client.uploads.create(
        filename="large.jsonl", purpose="fine-tune", bytes=len(content), mime_type="text/jsonl"
    )
    return upload.id, client.uploads.parts.create(upload.id, data=content).id, content


def test_while_an_upload_is_completed_it_is_neither_completed_again_nor_cancelled(live: Live) -> None:
    client = live.client()
    upload, part, content = begin_large(client, 50_000)
    with ThreadPoolExecutor() as pool:
        completing = pool.submit(client.uploads.complete, upload, part_ids=[part])
        while live.store.uploads.get("default", upload).claim is None:
            assert not completing.done()
            time.sleep(0.001)
        for call in (
            lambda: client.uploads.complete(upload, part_ids=[part]),
            lambda: client.uploads.cancel(upload),
            lambda: client.uploads.parts.create(upload, data=b"x"),
        ):
            with pytest.raises(openai.ConflictError, match="is being completed") as refused:
                call()
            assert refused.value.code == "conflict"
        done = completing.result()
    again = client.uploads.complete(upload, part_ids=[part])
    assert again == done
    assert again.file is not None
    assert (again.status, again.file.status) == ("completed", "processed")
    assert client.files.content(again.file.id).read() == content
    with pytest.raises(openai.ConflictError, match="is completed"):
        client.uploads.cancel(upload)
    assert list(live.store.upload_parts.all("default", parent=upload)) == []
    client.files.delete(again.file.id)
    with pytest.raises(openai.ConflictError, match="is completed"):
        client.uploads.complete(upload, part_ids=[part])


def test_of_many_who_end_an_upload_at_once_one_does_and_the_others_are_told(live: Live) -> None:
    client = live.client()
    for _ in range(5):
        upload, part, content = begin_large(client, 200)
        complete = partial(client.uploads.complete, upload, part_ids=[part])
        calls = [complete, complete, partial(client.uploads.cancel, upload), complete, complete]
        begun = threading.Barrier(len(calls))

        def end(call: Callable[[], Upload], begun: threading.Barrier = begun) -> Upload | openai.ConflictError:
            begun.wait(60)
            try:
                return call()
            except openai.ConflictError as error:
                return error

        with ThreadPoolExecutor(len(calls)) as pool:
            found = list(pool.map(end, calls))
        ends = [one for one in found if isinstance(one, Upload)]
        assert len({one.status for one in ends}) == 1
        if ends[0].status == "completed":
            assert {one.file.id for one in ends if one.file} == {f"file-{upload.removeprefix('upload_')}"}
            assert client.files.content(f"file-{upload.removeprefix('upload_')}").read() == content


def test_an_upload_whose_completion_is_refused_can_be_completed_or_cancelled_then(live: Live) -> None:
    client = live.client()
    upload, part, _ = begin_large(client, 10)
    with pytest.raises(openai.BadRequestError, match="MD5"):
        client.uploads.complete(upload, part_ids=[part], md5="0" * 32)
    assert live.store.uploads.get("default", upload).claim is None
    assert client.uploads.complete(upload, part_ids=[part]).status == "completed"


def test_a_server_that_is_killed_while_it_completes_an_upload_leaves_it_to_the_next(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Up(home)
    upload, part, content = begin_large(first.client(), 80_000)
    copied = home / "artifacts" / "files" / f"file-{upload.removeprefix('upload_')}"
    with ThreadPoolExecutor() as pool:
        completing = pool.submit(first.client().uploads.complete, upload, part_ids=[part])
        while not copied.exists():  # its lines are checked then
            assert not completing.done()
            time.sleep(0.001)
        first.stop(signal.SIGKILL)
        with pytest.raises(openai.APIConnectionError):
            completing.result()
    second = Up(home)
    client = second.client()
    assert list(client.files.list()) == []
    done = client.uploads.complete(upload, part_ids=[part])
    assert done.file is not None
    assert (done.status, done.file.status) == ("completed", "processed")
    assert client.files.content(done.file.id).read() == content
    assert second.stop() == 0


def test_a_file_that_was_there_before_the_kill_is_the_one_of_its_upload(start_live: Callable[..., Live]) -> None:
    live = start_live()
    client = live.client()
    upload, part, content = begin_large(client, 10)
    claim = UploadClaim(id="claim_1", owner=f"{socket.gethostname()}/{os.getpid()}/1.00", since=now())
    live.store.uploads.change("default", upload, lambda it: it.model_copy(update={"claim": claim}))
    file_id = f"file-{upload.removeprefix('upload_')}"
    add_file(live.store, "default", "large.jsonl", "fine-tune", io.BytesIO(content), id=file_id)
    with pytest.raises(openai.ConflictError, match="is completed"):
        client.uploads.cancel(upload)
    done = client.uploads.complete(upload, part_ids=[part])
    assert done.file is not None
    assert done.file.id == file_id
    assert list(live.store.upload_parts.all("default", parent=upload)) == []


def test_an_upload_expires_unless_somebody_completes_it(start_live: Callable[..., Live]) -> None:
    live = start_live()
    client = live.client()
    store = live.store
    claim = UploadClaim(id="claim_1", owner=this_owner(), since=now())
    for name, update in (("claimed", {"claim": claim}), ("left", {"claim": claim.model_copy(update={"since": 0})})):
        upload, _, _ = begin_large(client, 10)
        late = {"filename": name, "expires_at": now() - 1, **update}
        store.uploads.change("default", upload, lambda it, late=late: it.model_copy(update=late))  # type: ignore[misc]
    expire_uploads(store)
    assert {one.filename: one.status for one in store.uploads.all("default")} == {
        "claimed": "pending",
        "left": "expired",
    }
    assert len(list(store.upload_parts.all("default"))) == 1


def test_an_upload_is_of_its_project_alone(start_live: Callable[..., Live]) -> None:
    live = start_live()
    acme, other = live.client(live.key("acme")), live.client(live.key("other"))
    upload = acme.uploads.create(filename="x", purpose="user_data", bytes=1, mime_type="text/plain")
    with pytest.raises(openai.NotFoundError):
        other.uploads.parts.create(upload.id, data=b"x")
    with pytest.raises(openai.NotFoundError):
        other.uploads.cancel(upload.id)
