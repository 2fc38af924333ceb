from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from luthier.api.app import create_app
from luthier.workflows.models import pull
from tests.api.conftest import Live


def test_without_keys_everybody_on_loopback_may_do_everything(start_live: Callable[..., Live]) -> None:
    live = start_live()
    assert list(live.client().models.list()) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": ""},
        {"Host": "localhost.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_without_keys_pages_of_other_sites_are_refused(
    start_live: Callable[..., Live], headers: dict[str, str]
) -> None:
    live = start_live()
    reply = httpx.get(f"{live.url}/v1/models", headers=headers)
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "forbidden_host"
    assert next(iter(headers)) in reply.json()["error"]["message"]
    secret = live.key()
    keyed = {**headers, "Authorization": f"Bearer {secret}"}
    assert httpx.get(f"{live.url}/v1/models", headers=keyed).status_code == 200


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8000"])
def test_without_keys_this_machine_is_answered_by_any_of_its_names(start_live: Callable[..., Live], host: str) -> None:
    live = start_live()
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert httpx.get(f"{live.url}/v1/models", headers=headers).status_code == 200


def test_the_first_key_closes_the_door_and_its_revocation_does_not_open_it(start_live: Callable[..., Live]) -> None:
    live = start_live()
    secret = live.key()
    assert list(live.client(secret).models.list()) == []
    with pytest.raises(openai.AuthenticationError) as caught:
        live.client("sk-luthier-wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert "luthier key create" in caught.value.message
    assert httpx.get(f"{live.url}/v1/models").status_code == 401
    (key,) = live.store.keys.all()
    live.store.keys.revoke(key.id)
    with pytest.raises(openai.AuthenticationError):
        live.client(secret).models.list()


def test_a_key_is_hashed_at_rest(start_live: Callable[..., Live]) -> None:
    live = start_live()
    secret = live.key()
    with sqlite3.connect(live.store.home / "luthier.db") as database:
        dump = "\n".join(database.iterdump())
    assert secret not in dump
    assert secret.removeprefix("sk-luthier-") not in dump


def test_a_scope_bounds_what_a_key_may_do(start_live: Callable[..., Live], tiny_base: Path) -> None:
    live = start_live()
    pull(live.store, str(tiny_base))
    reader = live.client(live.key("default", "read"))
    assert [model.id for model in reader.models.list()] == ["tiny-base"]
    with pytest.raises(openai.PermissionDeniedError) as caught:
        reader.models.delete("tiny-base")
    assert caught.value.code == "insufficient_scope"
    writer = live.client(live.key("default", "write"))
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        writer.models.delete("tiny-base")


def test_an_alias_is_a_model_of_its_project_alone(start_live: Callable[..., Live], tiny_base: Path) -> None:
    live = start_live()
    pull(live.store, str(tiny_base))
    live.store.models.set_alias("acme", "support@production", "tiny-base")
    acme, other = live.client(live.key("acme")), live.client(live.key("other"))
    assert [model.id for model in acme.models.list()] == ["tiny-base", "support@production"]
    assert [model.id for model in other.models.list()] == ["tiny-base"]
    ask = {"model": "support@production", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    assert acme.chat.completions.create(**ask).model == "support@production"
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.create(**ask)
    assert acme.models.delete("support@production").deleted
    with pytest.raises(openai.NotFoundError):
        acme.chat.completions.create(**ask)


def test_a_caller_is_known_while_all_threads_are_busy(start_live: Callable[..., Live]) -> None:
    live = start_live()
    live.key()
    done = threading.Event()

    async def ask() -> int:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, done.wait)
        transport = httpx.ASGITransport(create_app(live.service))
        try:
            async with httpx.AsyncClient(transport=transport, base_url=live.url) as client, asyncio.timeout(60):
                return (await client.get("/v1/models", headers={"Authorization": "Bearer wrong"})).status_code
        finally:
            done.set()
            await busy

    assert asyncio.run(ask()) == 401
