from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from luthier.api.announcements import Announcer
from luthier.errors import InputError
from luthier.records.run import RunStatus
from luthier.records.webhook import EVENT_TYPES, WebhookDelivery, WebhookEndpoint
from luthier.serve.webhooks import MAX_ATTEMPTS, Sender, Targets, check_address, delay_seconds
from luthier.store.store import Store
from luthier.workflows.deliveries import announce_runs
from luthier.workflows.webhooks import create_endpoint, delete_endpoint, rotate_secret, update_endpoint
from tests.api.conftest import Live
from tests.api.receiver import Received, Receiver

SDKS = Path(sys.prefix) / "sdk"
ME = "test/1/0"
UNWRAP = """
import json, sys, openai
message = json.load(sys.stdin)
client = openai.OpenAI(api_key="none", webhook_secret=message["secret"])
event = client.webhooks.unwrap(message["body"], message["headers"])
print(json.dumps([openai.__version__, type(event).__name__, event.id, event.type, event.data.id]))
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home")
    yield store
    store.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def end_run(store: Store, number: int, status: RunStatus = "succeeded", project: str = "default") -> str:
    id = f"train-{number}"
    store.runs.add(id, "train", {}, project=project)
    assert store.runs.claim(ME, 60, lambda _: False, id)
    store.runs.finish(id, ME, status)
    return id


def endpoint(store: Store, receiver: Receiver, project: str = "default") -> tuple[WebhookEndpoint, str]:
    return create_endpoint(store, project, "test", receiver.url, EVENT_TYPES)


def deliveries(store: Store, project: str = "default") -> list[WebhookDelivery]:
    return list(store.outbox.deliveries.all(project))


def make_due(store: Store) -> None:
    for one in deliveries(store):
        store.outbox.deliveries.change(
            one.project, one.id, lambda delivery: delivery.model_copy(update={"next_attempt_at": 0})
        )


def announce_until(store: Store, is_done: Callable[[], bool], targets: Targets = "any") -> None:
    """Run what announces and delivers until something is the case."""

    async def run() -> None:
        sender = Sender(targets)
        announcing = asyncio.create_task(Announcer(store, sender).run())
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(is_done):
                assert not announcing.done()
                await asyncio.sleep(0.02)
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)
        await sender.close()

    asyncio.run(run())


def unwrap(major: str, secret: str, received: Received) -> list[str]:
    """Have a major of the SDK read a message."""
    environment = dict(os.environ)
    if (SDKS / major).is_dir():
        environment["PYTHONPATH"] = str(SDKS / major)
    message = {"secret": secret, "body": received.body.decode(), "headers": received.headers}
    done = subprocess.run(
        [sys.executable, "-c", UNWRAP],
        input=json.dumps(message),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    version, *event = json.loads(done.stdout)
    assert version.startswith(f"{major}.")
    return event


def test_the_sdk_manages_endpoints_and_never_sees_a_secret_twice(live: Live, receiver: Receiver) -> None:
    client = live.client()
    made = client.webhooks.create(name="one", url=receiver.url, event_types=["batch.completed"])
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint is not None
    assert made.signing_secret.endswith(made.signing_secret_hint[-5:])
    shown = client.webhooks.retrieve(made.id)
    assert made.signing_secret not in shown.model_dump_json()
    assert [one.id for one in client.webhooks.list()] == [made.id]
    changed = client.webhooks.update(made.id, name="two", event_types=["batch.failed"])
    assert (changed.name, changed.event_types, changed.url) == ("two", ["batch.failed"], receiver.url)
    rotated = client.webhooks.rotate_secret(made.id)
    assert rotated.signing_secret not in (made.signing_secret, None)
    tested = client.webhooks.test(made.id, event_type="eval.run.failed")
    assert (tested.status_code, tested.event_type) == (200, "eval.run.failed")
    event = client.webhooks.unwrap(
        receiver.received[0].body, receiver.received[0].headers, secret=rotated.signing_secret
    )
    assert event.type == "eval.run.failed"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(receiver.received[0].body, receiver.received[0].headers, secret=made.signing_secret)
    assert "batch.expired" in client.webhooks.event_types.list().data
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


def test_an_endpoint_that_cannot_be_is_refused_with_the_field(live: Live) -> None:
    client = live.client()
    for url in ("ftp://example.com", "http://", "http://user:secret@example.com", "nowhere", "http://[::1", "//a/b"):
        with pytest.raises(openai.BadRequestError, match="url"):
            client.webhooks.create(name="one", url=url, event_types=["batch.completed"])
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.create(name="one", url="http://localhost:1", event_types=["response.completed"])
    assert caught.value.param == "event_types[0]"
    made = client.webhooks.create(name="one", url="http://127.0.0.1:1", event_types=["batch.completed"])
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.test(made.id, event_type="batch.completed")
    assert caught.value.code == "endpoint_unreachable"
    client.webhooks.delete(made.id)


def test_only_an_admin_of_the_project_has_to_do_with_its_endpoints(start_live: Callable[..., Live]) -> None:
    live = start_live()
    admin, other = live.client(live.key("acme")), live.client(live.key("other"))
    made = admin.webhooks.create(name="one", url="http://127.0.0.1:1", event_types=["batch.completed"])
    with pytest.raises(openai.PermissionDeniedError):
        live.client(live.key("acme", "write")).webhooks.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        other.webhooks.delete(made.id)
    assert list(other.webhooks.list()) == []


@pytest.mark.parametrize("major", ["2", "3"])
def test_the_sdk_accepts_what_is_sent_when_a_job_ends(store: Store, receiver: Receiver, major: str) -> None:
    made, secret = endpoint(store, receiver)
    end_run(store, 1)
    announce_runs(store)
    announce_until(store, lambda: deliveries(store)[0].status == "delivered")
    (message,) = receiver.received
    (delivery,) = deliveries(store)
    assert message.headers["webhook-id"] == delivery.event
    assert unwrap(major, secret, message) == [
        "FineTuningJobSucceededWebhookEvent",
        delivery.event,
        "fine_tuning.job.succeeded",
        "ftjob-1",
    ]
    assert (delivery.parent, delivery.attempts, delivery.status_code) == (made.id, 1, 200)


def test_a_service_tells_of_a_job_that_the_command_line_ended(
    start_live: Callable[..., Live], receiver: Receiver
) -> None:
    live = start_live(processes=1)
    client = live.client()
    client.webhooks.create(
        name="one", url=receiver.url, event_types=["fine_tuning.job.cancelled", "fine_tuning.job.failed"]
    )
    live.store.runs.add("train-9", "train", {})
    live.store.runs.request("train-9", "cancel")
    (message,) = receiver.wait(1)
    assert json.loads(message.body)["type"] == "fine_tuning.job.cancelled"
    end_run(live.store, 10)  # nobody asked for this type
    end_run(live.store, 11, "failed", project="other")
    end_run(live.store, 12, "failed")
    types = [json.loads(one.body)["data"]["id"] for one in receiver.wait(2)]
    assert types == ["ftjob-9", "ftjob-12"]


def test_an_end_is_announced_once_however_many_look(store: Store, receiver: Receiver) -> None:
    endpoint(store, receiver)
    for number in range(20):
        end_run(store, number)
    with ThreadPoolExecutor(4) as executor:
        announced = [run.id for runs in executor.map(lambda _: announce_runs(store), range(4)) for run in runs]
    assert len(announced) == len(set(announced)) == len(deliveries(store)) == 20
    assert announce_runs(store) == []


def test_a_run_that_goes_on_and_ends_again_is_announced_again(store: Store, receiver: Receiver) -> None:
    endpoint(store, receiver)
    id = end_run(store, 1, "failed")
    announce_runs(store)
    store.runs.requeue(id)
    assert announce_runs(store) == []
    store.runs.request(id, "cancel")
    announce_runs(store)
    assert [one.type for one in deliveries(store)] == ["fine_tuning.job.failed", "fine_tuning.job.cancelled"]


def test_what_is_not_taken_is_sent_again_with_the_same_id(store: Store, receiver: Receiver) -> None:
    receiver.statuses[:] = [500, 302, 200]
    receiver.location = receiver.url
    endpoint(store, receiver)
    end_run(store, 1)
    announce_runs(store)
    for attempts in (1, 2):
        announce_until(store, lambda attempts=attempts: deliveries(store)[0].attempts == attempts)  # type: ignore[misc]
        assert deliveries(store)[0].status == "pending"
        make_due(store)
    announce_until(store, lambda: deliveries(store)[0].status == "delivered")
    assert len(receiver.received) == 3  # the redirect was not followed
    assert len({one.headers["webhook-id"] for one in receiver.received}) == 1
    assert len({one.body for one in receiver.received}) == 1


def test_waiting_grows_for_hours_and_then_it_is_given_up(store: Store, receiver: Receiver) -> None:
    assert 4 <= delay_seconds(1) <= 6
    assert 8 * 3600 < sum(delay_seconds(attempt) for attempt in range(1, MAX_ATTEMPTS)) < 12 * 3600
    receiver.statuses[:] = [503]
    endpoint(store, receiver)
    end_run(store, 1)
    announce_runs(store)
    (one,) = deliveries(store)
    store.outbox.deliveries.change(
        one.project, one.id, lambda delivery: delivery.model_copy(update={"attempts": MAX_ATTEMPTS - 1})
    )
    announce_until(store, lambda: deliveries(store)[0].status == "failed")
    assert deliveries(store)[0].status_code == 503


def test_an_address_that_is_gone_is_told_nothing_more_until_it_is_changed(store: Store, receiver: Receiver) -> None:
    receiver.statuses[:] = [410, 200]
    made, _ = endpoint(store, receiver)
    end_run(store, 1)
    announce_until(store, lambda: any(one.status == "failed" for one in deliveries(store)))
    gone = store.outbox.endpoints.get("default", made.id)
    assert gone.disabled is not None
    end_run(store, 2)
    announce_runs(store)
    assert len(deliveries(store)) == 1
    assert update_endpoint(store, "default", made.id, url=receiver.url).disabled is None
    end_run(store, 3)
    announce_until(store, lambda: deliveries(store)[-1].status == "delivered")


def test_a_deleted_endpoint_takes_its_deliveries_along(store: Store, receiver: Receiver) -> None:
    made, _ = endpoint(store, receiver)
    end_run(store, 1)
    announce_runs(store)
    delete_endpoint(store, "default", made.id)
    assert deliveries(store) == []
    assert store.outbox.claim(2**40, 10, {}, 4) == []


def test_nobody_else_gets_a_delivery_that_is_under_way(store: Store, receiver: Receiver) -> None:
    endpoint(store, receiver)
    for number in range(6):
        end_run(store, number)
    announce_runs(store)
    moment = deliveries(store)[0].next_attempt_at
    first = store.outbox.claim(moment, 30, {}, 4)
    second = store.outbox.claim(moment, 30, {first[0][0].id: 1}, 4)
    assert [len(first), len(second)] == [4, 2]
    assert store.outbox.claim(moment, 30, {}, 4) == []
    assert len(store.outbox.claim(moment + 31, 30, {}, 10)) == 6  # whoever had them was killed


def test_an_old_secret_signs_too_for_a_day(store: Store, receiver: Receiver) -> None:
    made, old = endpoint(store, receiver)
    _, new = rotate_secret(store, "default", made.id, keep_old_for_24_hours=True)
    end_run(store, 1)
    announce_until(store, lambda: bool(receiver.received))
    (message,) = receiver.received
    for secret in (old, new):
        client = openai.OpenAI(api_key="none", webhook_secret=secret)
        assert client.webhooks.unwrap(message.body, message.headers).type == "fine_tuning.job.succeeded"


def test_no_secret_is_in_the_database_and_the_key_file_is_the_owners_alone(store: Store, receiver: Receiver) -> None:
    _, secret = endpoint(store, receiver)
    with sqlite3.connect(store.home / "luthier.db") as database:
        dump = "\n".join(database.iterdump())
    assert secret not in dump
    assert secret.removeprefix("whsec_")[:20] not in dump
    assert stat.S_IMODE(store.secret_key.path.stat().st_mode) == 0o600
    assert [path.name for path in store.home.glob("secret.key*")] == ["secret.key"]


def test_another_key_file_signs_nothing_and_says_what_to_do(store: Store, receiver: Receiver) -> None:
    made, _ = endpoint(store, receiver)
    store.secret_key.path.write_bytes(b"x" * 32)
    end_run(store, 1)
    announce_runs(store)
    announce_until(store, lambda: deliveries(store)[0].attempts == 1)
    assert "is not the key" in (deliveries(store)[0].error or "")
    assert receiver.received == []
    rotate_secret(store, "default", made.id)
    make_due(store)
    announce_until(store, lambda: deliveries(store)[0].status == "delivered")


def test_addresses_where_clouds_keep_credentials_are_never_told(receiver: Receiver) -> None:
    async def tell(url: str, targets: Targets) -> str:
        sender = Sender(targets)
        try:
            attempt = await sender.send(url, {}, b"{}")
        finally:
            await sender.close()
        return attempt.error or str(attempt.status_code)

    mapped = f"http://[::ffff:127.0.0.1]:{receiver.port}/"
    for url in ("http://169.254.169.254/latest", "http://0.0.0.0:80", "http://[fe80::1]/", "http://224.0.0.1/"):
        assert "never told" in asyncio.run(tell(url, "any"))
        with pytest.raises(InputError, match="never told"):
            check_address(url)
    for url in (receiver.url, f"http://localhost:{receiver.port}/", mapped, "http://10.0.0.1/"):
        assert "may not be told" in asyncio.run(tell(url, "public"))
    assert receiver.received == []
    assert asyncio.run(tell(f"http://localhost:{receiver.port}/a?b=c", "any")) == "200"
    assert receiver.received[0].path == "/a?b=c"
    assert receiver.received[0].headers["host"] == f"localhost:{receiver.port}"


def test_an_address_with_a_user_or_of_another_kind_is_refused() -> None:
    for url in ("file:///etc/passwd", "http://a@b", "https://a/#b", "http:///path", "http://a:99999/"):
        with pytest.raises(InputError, match="url"):
            check_address(url)
