from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from luthier.api.app import create_app
from luthier.api.server import serve
from luthier.api.service import Limits, Service
from luthier.errors import ConflictError, InputError, NotFoundError
from luthier.llm.remote import RemoteModel
from luthier.records.completion import Sampling
from luthier.records.example import Message
from luthier.serve.pool import ModelPool, Resolved, ServedModelInfo
from luthier.store.store import Store
from tests.api.conftest import Live

NAME = "ft:tiny:acme:greeter:abc123"
ALIAS = "org/greeter@production"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
KEY = "sk-test"
LONG = 1900
CHOICES = 64


class Shelf:
    """One model folder under two names."""

    def __init__(self, folder: Path) -> None:
        self.folders = {NAME: folder, ALIAS: folder}

    def resolve(self, project: str, name: str) -> Resolved:
        if name not in self.folders:
            raise NotFoundError(f"The model {name!r} does not exist.")
        return Resolved(name, self.folders[name])

    def names(self, project: str) -> list[ServedModelInfo]:
        return [ServedModelInfo(name, created=1_700_000_000, root="tiny") for name in self.folders]

    def pool(self) -> ModelPool:
        return ModelPool(self.resolve, self.names)


@pytest.fixture(scope="module")
def live(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live(tmp_path_factory.mktemp("chat") / "home", Shelf(endless_model).pool())
    yield live
    live.close()


def assert_engine_is_free(live: Live) -> None:
    """See that a full-length answer is the only one that the engine works on."""
    (loaded,) = live.service.pool.loaded
    before = loaded.engine.generated_tokens
    live.client().chat.completions.create(model=NAME, **HELLO, max_tokens=LONG)
    assert loaded.engine.generated_tokens - before < CHOICES * LONG  # it stopped before the end
    assert loaded.engine.in_flight == 0


def test_the_openai_client_gets_an_answer(live: Live) -> None:
    answer = live.client().chat.completions.create(model=NAME, **HELLO, max_tokens=5)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer._request_id
    assert answer._request_id.startswith("req_")


def test_the_openai_client_reads_a_stream(live: Live) -> None:
    options = {"model": NAME, "max_tokens": 25} | HELLO
    stream = live.client().chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 25
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])


def test_a_stream_ends_with_done(live: Live) -> None:
    body = {"model": NAME, "max_tokens": 3, "stream": True} | HELLO
    response = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_many_clients_at_once_are_answered(live: Live) -> None:
    create = live.client().chat.completions.create
    with ThreadPoolExecutor(10) as executor:
        futures = [executor.submit(create, model=ALIAS, **HELLO, max_tokens=20) for _ in range(20)]
        assert all(future.result().usage.completion_tokens == 20 for future in futures)


def test_models_are_listed_and_retrieved_by_names_with_slashes_and_colons(live: Live) -> None:
    client = live.client()
    assert [model.id for model in client.models.list()] == [NAME, ALIAS]
    assert client.models.retrieve(ALIAS).id == ALIAS
    assert client.models.retrieve(NAME).owned_by == "luthier"
    with pytest.raises(openai.NotFoundError, match="Did you mean"):
        client.models.retrieve("org/greeter@produktion")


def test_an_unknown_model_is_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        live.client().chat.completions.create(model="nobody", **HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.request_id


def test_a_bad_option_is_a_bad_request_that_names_it(live: Live) -> None:
    client = live.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, **HELLO, logit_bias={"5": 10})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=HELLO["messages"], temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "0 1 2 " * 3000}], stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_broken_and_oversized_bodies_are_refused(start_live: Callable[..., Live]) -> None:
    live = start_live(limits=Limits(body_bytes=1000))
    url = f"{live.url}/v1/chat/completions"
    assert httpx.post(url, content=b"{nope").json()["error"]["type"] == "invalid_request_error"
    response = httpx.post(url, json={"messages": "x" * 2000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert httpx.post(url, json=[1]).status_code == 400
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port), timeout=60) as client:
        client.sendall(f"{head}Content-Length: {2**24}\r\n\r\n".encode())
        client.sendall(b" " * 2**24)  # all of it, before it listens
        assert client.recv(4096).startswith(b"HTTP/1.1 413")
    unknown = httpx.get(f"{live.url}/v1/nothing")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["message"]


def test_a_key_of_the_environment_is_asked_for(start_live: Callable[..., Live]) -> None:
    live = start_live(api_key=KEY)
    assert list(live.client(KEY).models.list()) == []
    with pytest.raises(openai.AuthenticationError) as caught:
        live.client(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{live.url}/v1/models").status_code == 401
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_a_stream_frees_the_engine(live: Live) -> None:
    client = live.client()
    stream = client.chat.completions.create(model=NAME, **HELLO, n=CHOICES, max_tokens=LONG, stream=True)
    next(iter(stream))
    stream.close()
    assert_engine_is_free(live)


def test_a_client_that_leaves_while_it_waits_frees_the_engine(live: Live) -> None:
    live.client().chat.completions.create(model=NAME, **HELLO, max_tokens=1)
    body = {"model": NAME, "max_tokens": LONG, "n": CHOICES} | HELLO
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.2))
    assert_engine_is_free(live)


def test_a_killed_engine_fails_the_stream_and_the_next_request_is_answered(live: Live) -> None:
    client = live.client()
    stream = client.chat.completions.create(model=NAME, **HELLO, max_tokens=LONG, stream=True)
    chunks = iter(stream)
    next(chunks)
    (loaded,) = live.service.pool.loaded
    os.kill(loaded.engine.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match=r"died \(signal 9\)"):
        list(chunks)
    answer = client.chat.completions.create(model=NAME, **HELLO, max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert [model.engine.pid for model in live.service.pool.loaded] != [loaded.engine.pid]


def test_ten_concurrent_first_requests_start_one_engine(endless_model: Path, tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    live = Live(tmp_path / "home", Shelf(endless_model).pool())
    client = live.client()
    with ThreadPoolExecutor(10) as executor:
        create = client.chat.completions.create
        futures = [executor.submit(create, model=NAME, **HELLO, max_tokens=2) for _ in range(10)]
        assert all(future.result().choices for future in futures)
    started = {child.pid for child in psutil.Process().children()} - before
    assert len(started) == 1
    live.close()
    assert not any(psutil.pid_exists(pid) for pid in started)


def test_our_own_remote_model_can_ask_our_server(live: Live) -> None:
    model = RemoteModel(f"{live.url}/v1", NAME, want_logprobs=True)
    prompts = [[Message(role="user", content=f"number {number}")] for number in range(5)]
    completions = model.answer(prompts, Sampling(max_tokens=4))
    model.close()
    assert [completion.completion_tokens for completion in completions] == [4] * 5
    assert all(completion.logprobs is not None and len(completion.logprobs) == 4 for completion in completions)


def test_serve_tells_its_url_and_a_signal_ends_it_without_orphans(endless_model: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom luthier.api.app import create_app\n"
        "from luthier.api.server import serve\nfrom luthier.api.service import Service\n"
        "from luthier.serve.pool import ModelPool, Resolved\nfrom luthier.store.store import Store\n"
        "pool = ModelPool(lambda project, name: Resolved(name, Path(sys.argv[1])), lambda project: [])\n"
        "app = create_app(Service(Store(Path(sys.argv[2])), pool))\n"
        "serve(app, '127.0.0.1', 0, lambda url: print(url, flush=True))"
    )
    command = [sys.executable, "-c", code, str(endless_model), str(tmp_path / "home")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        url = server.stdout.readline().strip()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
        assert client.chat.completions.create(model="x", **HELLO, max_tokens=1).choices
        (engine,) = psutil.Process(server.pid).children()
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        assert server.stdout.read() == ""
        assert server.stderr.read() == ""
    assert not engine.is_running()


def test_a_taken_port_and_a_foreign_address_are_told(tmp_path: Path) -> None:
    app = create_app(Service(Store(tmp_path / "home"), ModelPool(lambda *_: tmp_path, lambda _: [])))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConflictError, match="taken"):
            serve(app, "127.0.0.1", other.getsockname()[1])
    with pytest.raises(InputError, match="Cannot bind"):
        serve(app, "192.0.2.1", 0)
