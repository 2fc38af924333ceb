from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from luthier.llm.engine_process import EngineOptions
from luthier.serve.pool import ModelPool, Resolved, ServedModelInfo
from luthier.templates.chat_format import ChatFormat
from tests.api.conftest import Live

NAME = "ft:tiny:acme:writer:abc123"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 8}
LONG = 1900
CHOICES = 64


@pytest.fixture(scope="module")
def live(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    options = EngineOptions(precision="float32")  # so that an answer does not depend on what else is in the batch
    pool = ModelPool(
        lambda _, name: Resolved(name, endless_model), lambda _: [ServedModelInfo(NAME, created=1)], options=options
    )
    live = Live(tmp_path_factory.mktemp("completions") / "home", pool)
    yield live
    live.close()


@pytest.fixture(scope="module")
def chat_format(endless_model: Path) -> ChatFormat:
    return ChatFormat.load(endless_model)


def text_of(live: Live, **body: Any) -> str:
    return str(live.client().completions.create(**GREEDY | body).choices[0].text)


def refused(live: Live, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{live.url}/v1/completions", json=GREEDY | {"prompt": "hello"} | body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_the_openai_client_gets_text_that_goes_on_from_the_prompt(live: Live, chat_format: ChatFormat) -> None:
    answer = live.client().completions.create(**GREEDY, prompt="hello")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("length", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(chat_format.encode("hello"))
    assert answer.usage.completion_tokens == 8


def test_the_default_is_sixteen_tokens(live: Live) -> None:
    answer = live.client().completions.create(model=NAME, prompt="hello")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_a_prompt_as_text_and_as_tokens_is_the_same(live: Live, chat_format: ChatFormat) -> None:
    texts = ["hello", "good morning"]
    tokens = [chat_format.encode(text) for text in texts]
    alone = [text_of(live, prompt=text) for text in texts]
    for prompt in (texts, tokens):
        answer = live.client().completions.create(**GREEDY, prompt=prompt)
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(alone))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, tokens))
    assert text_of(live, prompt=tokens[1]) == alone[1]


def test_without_a_prompt_a_new_document_begins(live: Live, chat_format: ChatFormat) -> None:
    expected = text_of(live, prompt=[chat_format.end_of_text])
    assert httpx.post(f"{live.url}/v1/completions", json=GREEDY).json()["choices"][0]["text"] == expected
    assert text_of(live, prompt="") == expected


def test_the_prompt_is_echoed(live: Live, chat_format: ChatFormat) -> None:
    plain = text_of(live, prompt="hello")
    assert text_of(live, prompt="hello", echo=True) == f"hello{plain}"
    assert text_of(live, prompt=chat_format.encode("hello"), echo=True) == f"hello{plain}"
    chunks = live.client(_strict_response_validation=False).completions.create(
        **GREEDY, prompt="hello", echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == f"hello{plain}"


def test_each_prompt_gets_n_answers_of_its_own(live: Live) -> None:
    sampled = {"model": NAME, "max_tokens": 8, "seed": 3, "n": 2}
    answer = live.client().completions.create(**sampled, prompt=["hello", "order"])
    again = live.client().completions.create(**sampled, prompt="order")
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert [choice.text for choice in again.choices] == texts[2:]


def test_the_best_answers_are_those_with_the_likeliest_tokens(live: Live) -> None:
    sampled = {"model": NAME, "max_tokens": 8, "seed": 3, "prompt": "hello", "logprobs": 0}
    candidates = live.client().completions.create(**sampled, n=6)
    best = live.client().completions.create(**sampled, n=2, best_of=6)

    def likelihood(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    ranked = sorted(candidates.choices, key=likelihood, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage is not None
    assert best.usage.completion_tokens == candidates.usage.completion_tokens


@pytest.mark.parametrize("logprobs", [0, 1])
def test_logprobs_have_the_legacy_shape(live: Live, logprobs: int) -> None:
    choice = live.client().completions.create(**GREEDY, prompt="hello", logprobs=logprobs).choices[0]
    found = choice.logprobs
    assert found is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 8
    assert all(value < 0 for value in found.token_logprobs)
    assert found.text_offset[:2] == [0, len(found.tokens[0])]
    pairs = [{token: value} for token, value in zip(found.tokens, found.token_logprobs, strict=True)]
    assert found.top_logprobs == (pairs if logprobs else None)


def test_a_stop_string_ends_the_text(live: Live) -> None:
    free = text_of(live, prompt="hello", max_tokens=30)
    answer = live.client().completions.create(**GREEDY | {"max_tokens": 30}, prompt="hello", stop=["zzz", free[4:7]])
    assert answer.choices[0].text == free[: free.index(free[4:7])]
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_has_the_same_text_the_reason_and_the_usage(live: Live) -> None:
    # The package's type of a choice has no null for finish_reason, not even before the end, so it is not strict here.
    client = live.client(_strict_response_validation=False)
    options = GREEDY | {"prompt": ["hello", "order"], "logprobs": 0, "max_tokens": 20}
    whole = client.completions.create(**options)
    *chunks, usage = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    for index, choice in enumerate(whole.choices):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
        assert [token for part in parts for token in part.logprobs.tokens] == choice.logprobs.tokens
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.object for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize(
    ("option", "param"),
    [
        ({"suffix": "the end"}, "suffix"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1, "temperature": 1}, "logprobs"),
        ({"logprobs": 0, "echo": True}, "logprobs"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 21}, "best_of"),
        ({"n": 129}, "n"),
        ({"n": 100, "prompt": ["a"] * 100}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [2**62]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": "0 1 2 3 " * 2000}, "prompt"),
    ],
)
def test_what_cannot_be_honoured_is_a_bad_request_that_names_it(live: Live, option: dict[str, Any], param: str) -> None:
    error = refused(live, **option)
    assert error["param"] == param
    assert param in error["message"]


def test_options_that_change_nothing_are_tolerated(live: Live) -> None:
    harmless = {"suffix": "", "logit_bias": {}, "user": "me", "best_of": 1, "echo": False, "stop": None, "unheard": 1}
    harmless |= {"min_tokens": 0, "ignore_eos": False, "guided_json": None, "response_format": {"type": "text"}}
    assert text_of(live, prompt="hello", extra_body=harmless) == text_of(live, prompt="hello")


def test_a_prompt_that_fills_the_context_says_so(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="2048 tokens") as caught:
        live.client().completions.create(model=NAME, prompt=["hello", "0 1 2 3 " * 2000])
    assert caught.value.code == "context_length_exceeded"


def assert_engine_is_free(live: Live) -> None:
    """See that a full-length answer is the only one that the engine works on."""
    (loaded,) = live.service.pool.loaded
    before = loaded.engine.generated_tokens
    live.client().completions.create(**GREEDY | {"max_tokens": LONG}, prompt="hello")
    assert loaded.engine.generated_tokens - before < CHOICES * LONG  # it stopped before the end
    assert loaded.engine.in_flight == 0


def test_a_client_that_leaves_a_stream_frees_the_engine(live: Live) -> None:
    client = live.client(_strict_response_validation=False)
    stream = client.completions.create(**GREEDY | {"max_tokens": LONG}, prompt="hello", n=CHOICES, stream=True)
    next(iter(stream))
    stream.close()
    assert_engine_is_free(live)


def test_a_client_that_leaves_while_it_waits_frees_the_engine(live: Live) -> None:
    text_of(live, prompt="hello")
    body = GREEDY | {"max_tokens": LONG, "n": CHOICES, "prompt": "hello"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.2))
    assert_engine_is_free(live)
