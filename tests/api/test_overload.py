"""A request that takes too long ends, and one that is too many is told when to come again."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from luthier.llm.engine_interface import Engine
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.serve.deadline import RequestLimits
from luthier.serve.pool import ModelPool, Resolved
from tests.api.conftest import Live

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
LONG = 2000


@pytest.fixture(scope="module")
def serving(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Live]]:
    started: list[Live] = []

    def start(**limits: Any) -> Live:
        pool = ModelPool(lambda _, name: Resolved(name, endless_model), lambda _: [], limits=RequestLimits(**limits))
        started.append(Live(tmp_path_factory.mktemp("overload") / "home", pool))
        client = started[-1].client()
        while not started[-1].service.pool.loaded:  # a load goes on when those who wait for it gave up
            with contextlib.suppress(openai.InternalServerError):
                client.chat.completions.create(**ASKED, max_tokens=1)
        return started[-1]

    yield start
    for live in started:
        live.close()


def test_a_request_ends_at_its_deadline_and_frees_the_engine(serving: Callable[..., Live]) -> None:
    live = serving(seconds=1)
    client = live.client()
    with pytest.raises(openai.InternalServerError, match=r"within 1 seconds") as caught:
        client.chat.completions.create(**ASKED, max_tokens=LONG, n=30)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert caught.value.response.headers["x-should-retry"] == "false"
    chunks = client.chat.completions.create(**ASKED, max_tokens=LONG, n=30, stream=True)
    with pytest.raises(openai.APIError, match="was given up") as told:
        list(chunks)
    assert told.value.code == "deadline_exceeded"
    assert live.service.pool.loaded[0].engine.in_flight == 0
    assert client.chat.completions.create(**ASKED, max_tokens=1).choices


def test_a_model_that_is_asked_for_as_many_answers_as_it_takes_says_429(serving: Callable[..., Live]) -> None:
    live = serving(requests=60)
    client = live.client()
    streams = [client.chat.completions.create(**ASKED, max_tokens=LONG, n=30, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="asked for 60 answers") as caught:
        client.chat.completions.create(**ASKED, max_tokens=1)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("overloaded", "1")
    patient = threading.Timer(0.5, streams[0].close)
    patient.start()
    answer = live.client(max_retries=5).chat.completions.create(**ASKED, max_tokens=1)  # as the hint says
    assert answer.choices
    patient.join()
    streams[1].close()


def test_a_load_that_takes_too_long_is_not_waited_for(endless_model: Path, tmp_path: Path) -> None:
    pool = ModelPool(lambda _, name: Resolved(name, endless_model), lambda _: [], limits=RequestLimits(seconds=0.01))
    live = Live(tmp_path / "home", pool)
    response = httpx.post(f"{live.url}/v1/chat/completions", json=ASKED)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    live.close()


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_a_client_that_leaves_while_its_model_loads_frees_its_place(
    endless_model: Path, tmp_path: Path, path: str
) -> None:
    go_on, calls = threading.Event(), 0

    async def start(folder: Path, options: EngineOptions) -> Engine:
        nonlocal calls
        calls += 1
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return await EngineProcess.start(folder, options)

    def resolve(_: str, name: str) -> Resolved:
        return Resolved(name, endless_model)

    live = Live(tmp_path / "home", ModelPool(resolve, lambda _: [], start=start, limits=RequestLimits(requests=1)))
    asked = {"model": "tiny", "messages": ASKED["messages"], "prompt": "hello", "input": "hello"}
    names = {"chat/completions": ("messages", "max_tokens"), "completions": ("prompt", "max_tokens")}
    text, limit = names.get(path, ("input", "max_output_tokens"))
    body = {"model": "tiny", text: asked[text], limit: 16}
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/{path}", json=body, timeout=0.5)
        patient = threading.Timer(0.5, go_on.set)
        patient.start()
        deadline = time.monotonic() + 60
        while (answer := httpx.post(f"{live.url}/v1/{path}", json=body, timeout=60)).status_code == 429:
            assert not go_on.is_set(), "its place was free only once the model was loaded"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert answer.status_code == 200, answer.text
        assert calls == 1
        patient.join()
    finally:
        go_on.set()
        live.close()
