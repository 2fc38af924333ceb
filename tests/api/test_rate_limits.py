from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from luthier.api.rate_limits import RateLimiter, duration
from luthier.records.access import ApiKey, Caller, Rates
from luthier.serve.api_error import ApiError
from luthier.workflows.keys import create_key
from luthier.workflows.models import pull
from tests.api.conftest import Live

HELLO = {"model": "tiny-base", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.moment = 100.0

    def __call__(self) -> float:
        return self.moment


def caller(key: str = "a", requests: int | None = None, tokens: int | None = None) -> Caller:
    return Caller(key=key, rates=Rates(requests_per_minute=requests, tokens_per_minute=tokens))


def key(live: Live, requests: int | None = None, tokens: int | None = None) -> tuple[ApiKey, str]:
    rates = Rates(requests_per_minute=requests, tokens_per_minute=tokens)
    return create_key(live.store, "limited", "default", ["admin"], rates)


def test_a_key_gets_its_requests_and_then_has_to_wait_for_the_next() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    for _ in range(3):
        limiter.admit(caller(requests=3), 0)
    with pytest.raises(ApiError) as caught:
        limiter.admit(caller(requests=3), 0)
    assert caught.value.headers == {
        "retry-after": "20",
        "retry-after-ms": "20000",
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    assert (caught.value.status, caught.value.code, caught.value.type) == (429, "rate_limit_exceeded", "requests")
    limiter.admit(caller("b", requests=3), 0)
    clock.moment += 20
    limiter.admit(caller(requests=3), 0)
    clock.moment += 3600
    for _ in range(3):
        limiter.admit(caller(requests=3), 0)  # a minute's worth, however long it did not ask
    with pytest.raises(ApiError):
        limiter.admit(caller(requests=3), 0)


def test_tokens_are_estimated_before_and_settled_after() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    first = limiter.admit(caller(tokens=600), 100)
    limiter.settle(first, 50)  # fewer than estimated: 550 left
    second = limiter.admit(caller(tokens=600), 100)
    limiter.settle(second, 700)  # a debt of 150
    with pytest.raises(ApiError, match="600 tokens per minute") as caught:
        limiter.admit(caller(tokens=600), 0)
    assert caught.value.retry_after_seconds == pytest.approx(15.1)
    clock.moment += 15.2
    limiter.admit(caller(tokens=600), 0)


def test_a_prompt_larger_than_the_bound_is_let_in_when_nothing_else_was_used() -> None:
    limiter = RateLimiter(clock=Clock())
    limiter.admit(caller(tokens=10), 5000)
    with pytest.raises(ApiError):
        limiter.admit(caller(tokens=10), 1)


def test_a_key_without_bounds_takes_the_services_and_zero_is_none() -> None:
    limiter = RateLimiter(Rates(requests_per_minute=1), Clock())
    limiter.admit(caller(), 0)
    with pytest.raises(ApiError):
        limiter.admit(caller(), 0)
    for _ in range(5):
        assert limiter.admit(caller("free", requests=0), 0).headers == ()


def test_times_are_written_as_openai_writes_them() -> None:
    assert [duration(seconds) for seconds in (0, 0.12, 1, 59.5, 60, 372.1)] == [
        "0ms",
        "120ms",
        "1s",
        "59.5s",
        "1m0s",
        "6m13s",
    ]


def test_the_sdk_sees_its_bounds_and_a_rate_limit_error(start_live: Callable[..., Live]) -> None:
    live = start_live()
    _, secret = key(live, requests=2, tokens=1000)
    client = live.client(secret)
    headers = client.models.with_raw_response.list().headers
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert headers["x-ratelimit-limit-tokens"] == headers["x-ratelimit-remaining-tokens"] == "1000"
    with pytest.raises(openai.NotFoundError) as missed:
        client.files.retrieve("file-nobody")  # it counts, too
    assert missed.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError) as caught:
        client.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["x-ratelimit-limit-requests"] == "2"
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(caught.value.response.headers["retry-after-ms"]) <= 30_000
    assert caught.value.response.headers["x-request-id"]
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_tokens_of_an_answer_are_taken_from_the_key_that_asked(
    start_live: Callable[..., Live], tiny_base: Path
) -> None:
    live = start_live()
    pull(live.store, str(tiny_base))
    _, secret = key(live, tokens=60)
    client = live.client(secret)
    answer = client.chat.completions.create(**HELLO, max_tokens=50)
    assert answer.usage is not None
    headers = client.models.with_raw_response.list  # what is left allows a look, or not even that
    if answer.usage.total_tokens >= 60:
        with pytest.raises(openai.RateLimitError, match="60 tokens per minute"):
            headers()
    else:
        left = int(headers().headers["x-ratelimit-remaining-tokens"])
        assert left <= 60 - answer.usage.total_tokens + 5


def test_a_request_that_has_the_service_ask_models_pays_for_that(
    start_live: Callable[..., Live], tiny_base: Path
) -> None:
    live = start_live()
    pull(live.store, str(tiny_base))
    _, secret = key(live, tokens=5000)
    client = live.client(secret)
    grader = {
        "type": "score_model",
        "name": "score",
        "model": "tiny-base",
        "input": [{"role": "user", "content": "How good is it? " * 20}],
        "range": [0, 1],
    }
    client.post(
        "/fine_tuning/alpha/graders/run", body={"grader": grader, "model_sample": "hello"}, cast_to=httpx.Response
    )
    left = int(client.models.with_raw_response.list().headers["x-ratelimit-remaining-tokens"])
    assert left < 4900
