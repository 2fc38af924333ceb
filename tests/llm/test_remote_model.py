from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from luthier.errors import EngineError
from luthier.llm.remote import MAX_ATTEMPTS, RemoteModel
from luthier.records.completion import Sampling
from luthier.records.example import Message

PROMPT = [Message(role="system", content="Be brief."), Message(role="user", content="hello")]


class Endpoint(ThreadingHTTPServer):
    """A chat endpoint on loopback: it fails as often as it is told to, then echoes the last message."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures: list[tuple[int, dict[str, str], str]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.choice: dict[str, Any] = {"finish_reason": "stop"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append({"path": self.path} | body)
        self.server.headers.append(dict(self.headers))
        if self.server.failures:
            self._reply(*self.server.failures.pop(0))
        else:
            message = {"role": "assistant", "content": f"echo {body['messages'][-1]['content']}"}
            choice = {"index": 0, "message": message} | self.server.choice
            usage = {"prompt_tokens": 11, "completion_tokens": 3}
            self._reply(200, {}, json.dumps({"choices": [choice], "usage": usage}))

    def _reply(self, status: int, headers: dict[str, str], text: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(text.encode()))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever)
        thread.start()
        yield endpoint
        endpoint.shutdown()
        thread.join()


def model(endpoint: Endpoint, **options: Any) -> RemoteModel:
    return RemoteModel(endpoint.url, "their-model", "secret", backoff_seconds=0.001, **options)


def test_answers_come_in_order_with_the_endpoints_token_counts(endpoint: Endpoint) -> None:
    prompts = [[Message(role="user", content=str(number))] for number in range(30)]
    seen: set[int] = set()
    completions = model(endpoint).answer(prompts, Sampling(), lambda index, _: seen.add(index))
    assert [completion.text for completion in completions] == [f"echo {number}" for number in range(30)]
    assert seen == set(range(30))
    assert (completions[0].prompt_tokens, completions[0].completion_tokens) == (11, 3)
    assert completions[0].tokens is None


def test_the_request_has_the_key_and_only_the_options_that_were_set(endpoint: Endpoint) -> None:
    model(endpoint).answer([PROMPT], Sampling(max_tokens=5))
    assert endpoint.headers[0]["authorization"] == "Bearer secret"
    assert endpoint.requests[0] == {
        "path": "/v1/chat/completions",
        "model": "their-model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "max_tokens": 5,
    }
    sampling = Sampling(max_tokens=5, top_p=0.5, seed=0, stop=("x",), presence_penalty=1)
    model(endpoint, max_tokens_field="max_completion_tokens").answer([PROMPT], sampling)
    assert endpoint.requests[1].items() >= {"top_p": 0.5, "seed": 0, "stop": ["x"], "presence_penalty": 1}.items()
    assert endpoint.requests[1]["max_completion_tokens"] == 5
    assert "max_tokens" not in endpoint.requests[1]


def test_logprobs_are_asked_for_only_when_wanted(endpoint: Endpoint) -> None:
    endpoint.choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]}
    (completion,) = model(endpoint, want_logprobs=True).answer([PROMPT], Sampling())
    assert endpoint.requests[0]["logprobs"] is True
    assert completion.logprobs == (-0.5, -1.5)
    model(endpoint).answer([PROMPT], Sampling())
    assert "logprobs" not in endpoint.requests[1]


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.failures = [(429, {"retry-after": "0"}, ""), (503, {"retry-after-ms": "1"}, ""), (500, {}, "")]
    (completion,) = model(endpoint).answer([PROMPT], Sampling())
    assert completion.text == "echo hello"
    assert len(endpoint.requests) == 4


def test_an_endpoint_that_stays_busy_is_an_error_with_its_status(endpoint: Endpoint) -> None:
    endpoint.failures = [(503, {"retry-after": "0"}, '{"error": {"message": "no room"}}')] * MAX_ATTEMPTS
    with pytest.raises(EngineError, match="503: no room"):
        model(endpoint).answer([PROMPT], Sampling())
    assert len(endpoint.requests) == MAX_ATTEMPTS


def test_a_refusal_is_not_repeated_and_carries_the_endpoints_message(endpoint: Endpoint) -> None:
    endpoint.failures = [(400, {}, '{"error": {"message": "temperature must be 1"}}')]
    with pytest.raises(EngineError, match="400: temperature must be 1"):
        model(endpoint).answer([PROMPT], Sampling())
    endpoint.failures = [(401, {}, "who are you")]
    with pytest.raises(EngineError, match="check the API key"):
        model(endpoint).answer([PROMPT], Sampling())
    assert len(endpoint.requests) == 2


def test_an_answer_cut_by_its_limit_says_so_and_an_empty_one_is_empty(endpoint: Endpoint) -> None:
    endpoint.choice = {"finish_reason": "length", "message": {"role": "assistant", "content": None}}
    (completion,) = model(endpoint).answer([PROMPT], Sampling())
    assert completion.finish_reason == "length"
    assert completion.text == ""


def test_an_answer_in_an_unknown_shape_is_an_error(endpoint: Endpoint) -> None:
    endpoint.failures = [(200, {}, '{"choices": []}')]
    with pytest.raises(EngineError, match="unknown shape"):
        model(endpoint).answer([PROMPT], Sampling())
    endpoint.failures = [(200, {}, "<html>")]
    with pytest.raises(EngineError, match="JSON object"):
        model(endpoint).answer([PROMPT], Sampling())


def test_an_endpoint_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        RemoteModel("http://127.0.0.1:9/v1", "nobody", backoff_seconds=0).answer([PROMPT], Sampling())
