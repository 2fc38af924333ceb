from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from luthier.llm.embedding_format import EmbeddingFormat
from luthier.store.store import Store
from luthier.workflows.models import pull, set_alias
from luthier.workflows.serving import model_pool
from tests.api.conftest import Live

ENCODER = "tiny-encoder"
TEXTS = ["hello world", "The quick brown fox jumps over the lazy dog", "order"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("embeddings") / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    pull(store, str(tiny_encoder))
    live = Live(home, model_pool(store, stand_ins={"text-embedding-*": ENCODER}))
    yield live
    live.close()
    store.close()


def ask(live: Live, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/embeddings", json={"model": ENCODER} | body, timeout=60)


def vectors(live: Live, **body: Any) -> np.ndarray:
    response = ask(live, **body)
    assert response.status_code == 200, response.text
    return np.array([one["embedding"] for one in response.json()["data"]], dtype=np.float32)


def test_ten_concurrent_first_requests_start_one_encoder(live: Live) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with ThreadPoolExecutor(10) as executor:
        answers = list(executor.map(lambda _: ask(live, input="hello world").json(), range(10)))
    assert len({str(answer) for answer in answers}) == 1
    assert len({child.pid for child in psutil.Process().children()} - before) == 1


def test_the_openai_client_gets_a_vector_for_each_text(live: Live) -> None:
    answer = live.client().embeddings.create(model=ENCODER, input=TEXTS)
    assert [(one.object, one.index, len(one.embedding)) for one in answer.data] == [
        ("embedding", n, 32) for n in (0, 1, 2)
    ]
    np.testing.assert_allclose([one.embedding for one in answer.data], vectors(live, input=TEXTS), atol=1e-6)
    tokens = EmbeddingFormat.load(live.store.models.base_folder(live.store.models.base(ENCODER))).tokens(TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, tokens))
    assert (answer.model, answer.object) == (ENCODER, "list")


def test_a_text_alone_in_a_list_and_as_tokens_has_the_same_vector(live: Live) -> None:
    tokens = EmbeddingFormat.load(live.store.models.base_folder(live.store.models.base(ENCODER))).tokens(TEXTS)
    alone = np.concatenate([vectors(live, input=text) for text in TEXTS])
    np.testing.assert_allclose(vectors(live, input=tokens), alone, atol=1e-6)
    np.testing.assert_allclose(vectors(live, input=TEXTS), alone, atol=1e-6)
    np.testing.assert_allclose(vectors(live, input=tokens[0])[0], alone[0], atol=1e-6)


def test_base64_is_float32_little_endian_and_the_same_numbers(live: Live) -> None:
    data = ask(live, input=TEXTS, encoding_format="base64").json()["data"]
    decoded = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in data]
    np.testing.assert_array_equal(decoded, vectors(live, input=TEXTS, encoding_format="float"))
    client = live.client(_strict_response_validation=False)
    raw = client.embeddings.with_raw_response.create(model=ENCODER, input="order")
    assert isinstance(raw.http_response.json()["data"][0]["embedding"], str)
    np.testing.assert_allclose(raw.parse().data[0].embedding, decoded[2], atol=1e-6)


def test_fewer_dimensions_are_the_first_ones_of_length_one(live: Live) -> None:
    whole, short = vectors(live, input=TEXTS), vectors(live, input=TEXTS, dimensions=8)
    np.testing.assert_allclose(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["hello", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["hello", [1]]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": None}, "input"),
        ({}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "hello " * 200}, "input"),
        ({"input": "hello", "dimensions": 33}, "dimensions"),
        ({"input": "hello", "dimensions": 0}, "dimensions"),
        ({"input": "hello", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "hello", "model": "tiny-base"}, "model"),
    ],
)
def test_what_cannot_be_embedded_is_a_bad_request_that_names_the_field(
    live: Live, body: dict[str, Any], param: str
) -> None:
    response = ask(live, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_text_that_is_too_long_says_how_long_it_may_be(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match=r"input\[1\] has \d+ tokens.* reads 64 at most") as caught:
        live.client().embeddings.create(model=ENCODER, input=["hello", "hello " * 200])
    assert caught.value.code == "context_length_exceeded"


def test_an_encoder_is_not_asked_for_answers(live: Live) -> None:
    client = live.client()
    for ask_it in (
        lambda: client.chat.completions.create(model=ENCODER, messages=[{"role": "user", "content": "hello"}]),
        lambda: client.completions.create(model=ENCODER, prompt="hello"),
        lambda: client.responses.create(model=ENCODER, input="hello"),
    ):
        with pytest.raises(openai.BadRequestError, match="is an encoder") as caught:
            ask_it()
        assert caught.value.param == "model"


def test_names_of_openai_and_aliases_stand_for_encoders_and_unknown_ones_are_not_found(live: Live) -> None:
    set_alias(live.store, "default", "search@production", ENCODER)
    client = live.client()
    names = ["text-embedding-3-small", "search@production", ENCODER]
    found = [client.embeddings.create(model=name, input="order") for name in names]
    assert [answer.model for answer in found] == names
    assert len({str(answer.data) for answer in found}) == 1
    assert {ENCODER, "search@production"} <= {model.id for model in client.models.list()}
    stand_in = client.models.retrieve("text-embedding-3-small")
    assert (stand_in.id, stand_in.root) == ("text-embedding-3-small", ENCODER)
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="nobody", input="order")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_client_that_leaves_frees_the_encoder(live: Live) -> None:
    vectors(live, input="hello")
    (loaded,) = live.service.pool.loaded_encoders
    tokens = [[2] + [7] * 60 + [3]] * 2000
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{live.url}/v1/embeddings", json={"model": ENCODER, "input": tokens}, timeout=httpx.Timeout(10, read=0.2)
        )
    vectors(live, input="hello")
    assert loaded.engine.in_flight == 0


def test_a_killed_encoder_is_started_again_for_the_next_request(live: Live) -> None:
    before = vectors(live, input=TEXTS)
    (loaded,) = live.service.pool.loaded_encoders
    os.kill(loaded.engine.pid, signal.SIGKILL)
    while loaded.engine.alive:
        time.sleep(0.01)
    np.testing.assert_array_equal(vectors(live, input=TEXTS), before)
    (again,) = live.service.pool.loaded_encoders
    assert again.engine.pid != loaded.engine.pid
