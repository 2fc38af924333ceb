from __future__ import annotations

import json
import time

import httpx
import pytest

from luthier.api.json_bodies import MAX_DEPTH, check_json
from luthier.serve.api_error import ApiError
from tests.api.conftest import Live

CHAT = "/v1/chat/completions"
UNSOUND = {
    "broken": b'{"model": ',
    "not utf-8": b'{"model": "\xff\xfe"}',
    "utf-16": '{"model": "a"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "deep arrays": b'{"model": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep and unfinished": b"[" * 100_000,
    "rather deep": b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
    "NaN": b'{"model": "a", "temperature": NaN}',
    "Infinity": b'{"model": "a", "temperature": -Infinity}',
    "a float beyond floats": b'{"model": "a", "temperature": 1e999}',
    "a huge integer": b'{"model": "a", "seed": 1' + b"0" * 10_000 + b"}",
    "an integer beyond 64 bits": b'{"model": "a", "seed": 9223372036854775808}',
    "half a surrogate pair": b'{"model": "\\ud800"}',
    "surrogates in the wrong order": b'{"model": "\\udc00\\ud800"}',
    "NUL in a value": b'{"model": "a\\u0000b"}',
    "NUL in a key": b'{"a\\u0000b": 1}',
    "a raw NUL": b'{"model": "a\x00b"}',
    "a key twice": b'{"model": "a", "model": "b"}',
    "a key twice within": b'{"a": [{"b": {"c": 1, "c": 2}}]}',
}


@pytest.mark.parametrize("what", UNSOUND)
def test_an_unsound_body_is_a_bad_request(live: Live, what: str) -> None:
    response = httpx.post(f"{live.url}{CHAT}", content=UNSOUND[what], headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_json"
    assert error["message"].startswith("The body is no JSON that can be read: ")
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "\\ud83d\\ude00", "b": "\\\\u0000", "c": "\\u0001"}',
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b'{"a": -9223372036854775807, "b": 1e308, "c": 0.1, "d": null, "e": ""}',
        '{"ä": "😀"}'.encode(),
        b" null ",
    ],
)
def test_a_sound_body_is_let_through(body: bytes) -> None:
    check_json(body)


def test_looking_for_a_key_that_is_there_twice_does_not_take_forever() -> None:
    names = [f'"{number}":0' for number in range(200_000)]
    body = "{" + ",".join([*names, names[-1]]) + "}"
    started = time.process_time()
    with pytest.raises(ApiError, match="'199999' is there twice"):
        check_json(body.encode())
    assert time.process_time() - started < 60  # a square would take an hour


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
def test_another_type_of_body_is_told_apart(live: Live, kind: str) -> None:
    response = httpx.post(f"{live.url}{CHAT}", content=b'{"model": "a"}', headers={"content-type": kind})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_content_type"


def test_a_form_where_json_belongs_and_json_where_a_form_belongs_are_bad_requests(live: Live) -> None:
    form = httpx.post(f"{live.url}{CHAT}", files={"file": b"x"})
    assert form.status_code == 400
    other = httpx.post(f"{live.url}/v1/files", json={"purpose": "batch"})
    assert other.status_code == 400
    assert other.json()["error"]["param"]


@pytest.mark.parametrize(
    "body", [b"", b"no boundary", b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nunfinished']
)
def test_a_broken_form_is_a_bad_request(live: Live, body: bytes) -> None:
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
        response = httpx.post(f"{live.url}/v1/files", content=body, headers={"content-type": kind})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


def test_odd_methods_and_paths_are_answered_as_everything_is(live: Live) -> None:
    for method, path, status in (
        ("HEAD", CHAT, 405),
        ("OPTIONS", "/v1/files", 405),
        ("PUT", "/v1/files", 405),
        ("FOO", "/v1/files", 405),
        ("GET", "/v1/files/", 404),
        ("GET", "/v1/files/%00", 400),
        ("GET", "/v1/files?after=%00", 400),
        ("GET", "/v1/files/%ff", 404),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/files/../../etc/passwd", 404),
        ("GET", "/v1/files?limit=99999999999999999999999", 400),
        ("GET", "/v1/files?limit=-1", 400),
        ("GET", "/v1/files?limit=NaN", 400),
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
    ):
        response = httpx.request(method, f"{live.url}{path}")
        assert response.status_code == status, (method, path, response.text)
        assert response.headers["x-request-id"].startswith("req_")
        if method != "HEAD":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_bounded_too(live: Live) -> None:
    def chunks() -> object:
        for _ in range(200):
            yield b" " * 2**16

    response = httpx.post(f"{live.url}{CHAT}", content=chunks(), headers={"content-type": "application/json"})  # type: ignore[arg-type]
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_names_of_files_have_no_characters_that_databases_refuse(live: Live) -> None:
    for name in ("a\x00b", "a\nb", "\x7f"):
        head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\nhello\r\n'
        rest = '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--x--\r\n'
        response = httpx.post(
            f"{live.url}/v1/files",
            content=(head + rest).encode(),
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
        assert response.status_code < 500
        if response.status_code == 200:
            assert json.loads(response.text)["filename"].isprintable()


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6, 0])
def test_numbers_that_an_engine_cannot_tell_from_zero_are_no_failure_of_the_engine(
    live: Live, temperature: float
) -> None:
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answered = httpx.post(f"{live.url}{CHAT}", json=body | {"temperature": temperature, "top_p": temperature})
    assert answered.status_code == 200, answered.text
    refused = httpx.post(f"{live.url}{CHAT}", json=body | {"repetition_penalty": 5e-324})
    assert refused.json()["error"]["param"] == "repetition_penalty"
