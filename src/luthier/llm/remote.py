"""Any OpenAI-compatible chat endpoint as a :class:`luthier.llm.model.LanguageModel`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

import httpx

from luthier.errors import EngineError
from luthier.llm.model import OnAnswer, Prompt
from luthier.records.completion import Completion, Sampling

MAX_IN_FLIGHT = 8
MAX_ATTEMPTS = 5
MAX_WAIT_SECONDS = 60.0
TIMEOUT_SECONDS = 600.0
CONNECT_TIMEOUT_SECONDS = 10.0
RETRIED_STATUSES = frozenset({408, 409, 429, 500, 502, 503, 504})
MAX_MESSAGE_CHARACTERS = 500

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class RemoteModel:
    """A model behind ``{base_url}/chat/completions``.

    Args:
        base_url: Such as ``https://api.openai.com/v1``.
        model: The endpoint's name for the model; also this model's name.
        api_key: Sent as a bearer token; None where the endpoint needs none.
        want_logprobs: Ask for the chosen tokens' logprobs, which not every endpoint gives.
        want_tokens: Ask for the tokens themselves (``return_token_ids``), which vLLM and Luthier give.
        max_tokens_field: OpenAI's newer models only take ``max_completion_tokens``; many others only ``max_tokens``.
        backoff_seconds: The first wait before a retry; it doubles each time.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        want_logprobs: bool = False,
        want_tokens: bool = False,
        max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        backoff_seconds: float = 0.5,
    ) -> None:
        self._model = model
        self._extras = ({"logprobs": True} if want_logprobs else {}) | (
            {"return_token_ids": True} if want_tokens else {}
        )
        self._max_tokens_field = max_tokens_field
        self._backoff_seconds = backoff_seconds
        self._closing = threading.Event()
        self._client = httpx.Client(
            base_url=base_url.rstrip("/") + "/",
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            trust_env=httpx.URL(base_url).host not in LOOPBACK,  # a proxy has no way back to this machine
            timeout=httpx.Timeout(TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS),
            limits=httpx.Limits(max_connections=MAX_IN_FLIGHT),
        )

    @property
    def name(self) -> str:
        """The endpoint's name for the model."""
        return self._model

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_answer: OnAnswer | None = None
    ) -> list[Completion]:
        """Return one completion per prompt, in the prompts' order, eight at a time.

        ``on_answer(index, completion)`` is called in the caller's thread as each one finishes, in any order. Token
        counts are the endpoint's own, 0 where it does not tell. Any finish reason but "length" counts as "stop".

        Raises:
            EngineError: the endpoint cannot be reached, refuses a prompt, or fails after all retries.
        """
        completions: dict[int, Completion] = {}
        executor = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix=f"ask {self._model}")
        try:
            futures = {
                executor.submit(self._answer_one, prompt, sampling): index for index, prompt in enumerate(prompts)
            }
            for future in as_completed(futures):
                index = futures[future]
                completions[index] = future.result()
                if on_answer is not None:
                    on_answer(index, completions[index])
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
        return [completions[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Close the connections; further calls are errors."""
        self._closing.set()
        self._client.close()

    def _answer_one(self, prompt: Prompt, sampling: Sampling) -> Completion:
        started = time.perf_counter()
        body = self._post(self._request_body(prompt, sampling))
        try:
            return _completion(body, time.perf_counter() - started)
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{self._model} answered in an unknown shape ({error!r}): {str(body)[:200]}") from error

    def _request_body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Return the request; options at their defaults are left out, because not every endpoint knows them."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in prompt],
            "temperature": sampling.temperature,
            self._max_tokens_field: sampling.max_tokens,
        }
        optional = sampling.model_dump(
            include={"top_p", "seed", "stop", "frequency_penalty", "presence_penalty"}, exclude_defaults=True
        )
        body |= {key: list(value) if key == "stop" else value for key, value in optional.items()}
        return body | self._extras

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            last = attempt == MAX_ATTEMPTS
            wait_seconds = self._backoff_seconds * 2 ** (attempt - 1)
            try:
                response = self._client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                if last:
                    raise EngineError(f"{self._client.base_url} cannot be reached: {error!r}") from error
            else:
                if response.is_success:
                    return _json_object(response)
                if last or response.status_code not in RETRIED_STATUSES:
                    raise _status_error(response)
                wait_seconds = _retry_after_seconds(response, wait_seconds)
            if self._closing.wait(min(wait_seconds, MAX_WAIT_SECONDS)):
                raise EngineError(f"The model {self._model} was closed.")
        raise AssertionError("unreachable: the last attempt returns or raises")


def _completion(body: dict[str, Any], seconds: float) -> Completion:
    choice = body["choices"][0]
    usage = body.get("usage") or {}
    content = (choice.get("logprobs") or {}).get("content")
    return Completion(
        text=choice["message"].get("content") or "",
        tokens=tuple(tokens) if (tokens := choice.get("token_ids")) is not None else None,
        logprobs=tuple(entry["logprob"] for entry in content) if content else None,
        finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        seconds=seconds,
    )


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise EngineError(f"{response.url} did not answer with a JSON object: {response.text[:200]!r}")
    return body


def _status_error(response: httpx.Response) -> EngineError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    hint = "check the API key" if response.status_code == httpx.codes.UNAUTHORIZED else None
    return EngineError(
        f"{response.url} answered {response.status_code}: {str(message)[:MAX_MESSAGE_CHARACTERS]}", hint=hint
    )


def _retry_after_seconds(response: httpx.Response, default: float) -> float:
    for header, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(response.headers[header]) * unit)
        except (KeyError, ValueError):
            continue
    return default
