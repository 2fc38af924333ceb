"""One model of a server as an engine: its tokens come from ``/v1/completions``, asked with tokens.

A server that gives token ids (vLLM's ``return_token_ids``) is exact. One that does not (llama.cpp's) gives text: its
answers are the same, but their tokens are only counted.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from luthier.errors import EngineError, InputError, LuthierError, NotFoundError
from luthier.llm.engine_interface import ALTERNATIVES, TokenDelta
from luthier.llm.engine_server import EngineServer, error_message
from luthier.records.completion import Constraint, FinishReason, Sampling

OPTIONS = frozenset({"logprobs", ALTERNATIVES, "top_k", "min_p", "repetition_penalty", "logit_bias", "constraint"})
SEEDS = 2**63
DATA = "data: "
TOKEN_ID = "token_id:"  # noqa: S105 - how vLLM writes a token where it is asked for ids


class RemoteEngine:
    """A model of a server.

    Args:
        server: The server.
        model: The server's name of the model.
        load: Has the server load the model, where it can; asked when the server has forgotten it.
        on_close: Frees the model.
        share: Says how many engines share the server, with this one.
        context_length: How many tokens the server takes; None where it does not say.
        is_llama_cpp: Whether the server is llama.cpp's, which tells no tokens and takes grammars in its own field.
    """

    def __init__(
        self,
        server: EngineServer,
        model: str,
        *,
        load: Callable[[], Awaitable[None]] | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
        share: Callable[[], int] = lambda: 1,
        context_length: int | None = None,
        is_llama_cpp: bool = False,
    ) -> None:
        self._server = server
        self._model = model
        self._load = load
        self._on_close = on_close
        self._share = share
        self._context_length = context_length
        self._is_llama_cpp = is_llama_cpp
        self._closed = False
        self._generated_tokens = 0
        self._responses: set[httpx.Response] = set()
        self._in_flight = 0

    @property
    def alive(self) -> bool:
        """Whether the engine can take requests."""
        return not self._closed and self._server.alive

    @property
    def in_flight(self) -> int:
        """How many answers are being generated or waited for."""
        return self._in_flight

    @property
    def options(self) -> frozenset[str]:
        """What of a sampling such a server can honour."""
        return OPTIONS - {"logprobs", ALTERNATIVES} if self._is_llama_cpp else OPTIONS

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt and its answer may have together, where the server says so."""
        return self._context_length

    @property
    def generated_tokens(self) -> int:
        """How many tokens the engine has made so far, those of cancelled answers as far as they were seen."""
        return self._generated_tokens

    @property
    def memory_bytes(self) -> int:
        """The model's share of the server's resident memory; 0 for a server that others started."""
        return self._server.memory_bytes // self._share()

    async def generate(
        self, prompt_tokens: Sequence[int], sampling: Sampling, stop_tokens: Sequence[int]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Yield an answer's tokens, or its text, as they come; the last delta has a finish reason.

        Closing the iterator early closes the connection, upon which the server drops the answer.

        Raises:
            EngineError: the server failed, or it cannot be reached.
            BusyError: the server has no room for a further request now.
            InputError: the server cannot answer such a request.
        """
        if not self.alive:
            raise EngineError(f"The engine of {self._model} has ended.")
        body = request_body(self._model, prompt_tokens, sampling, stop_tokens)
        if self._is_llama_cpp and sampling.constraint is not None:
            if sampling.constraint.is_dispatched:
                raise InputError("This model's server cannot bind the calls in an answer that may also be text.")
            body = {**body, "grammar": sampling.constraint.grammar}
        self._in_flight += 1
        try:
            events = self._events(body)
            async with aclosing(events), aclosing(_deltas(events, prompt_tokens, sampling.logprobs)) as deltas:
                async for delta in deltas:
                    self._generated_tokens += len(delta.tokens) + delta.unlisted_tokens
                    yield delta
        except httpx.StreamError as error:  # closed under our hands
            raise EngineError(f"The engine of {self._model} was closed.") from error
        except LuthierError as error:
            if self._closed:
                raise EngineError(f"The engine of {self._model} was closed.") from error
            raise
        finally:
            self._in_flight -= 1

    async def close(self) -> None:
        """Free the model; answers still in flight raise EngineError. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for response in list(self._responses):
            await response.aclose()
        if self._on_close is not None:
            await self._on_close()

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the stream's events; a server that has forgotten the model loads it once more."""
        for may_load in (self._load is not None, False):
            try:
                async with self._server.stream(body) as response:
                    self._responses.add(response)
                    try:
                        async for event in _parse(response.aiter_lines()):
                            yield event
                    finally:
                        self._responses.discard(response)
                return
            except NotFoundError as error:
                if not may_load or self._load is None:
                    raise EngineError(error.message) from error
                await self._load()


def request_body(
    model: str, prompt_tokens: Sequence[int], sampling: Sampling, stop_tokens: Sequence[int]
) -> dict[str, Any]:
    """Return the body of ``/v1/completions``.

    Everything that decides the answer is said, because a server takes what is left out from the model's
    ``generation_config.json``. Without stop tokens the answer only ends at its limit.
    """
    return {
        "model": model,
        "prompt": list(prompt_tokens),
        "add_special_tokens": False,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "stop_token_ids": list(stop_tokens),
        "ignore_eos": not stop_tokens,
        **_logprob_options(sampling.logprobs),
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({} if sampling.seed is None else {"seed": sampling.seed % SEEDS}),
        **({"logit_bias": {str(id): bias for id, bias in sampling.logit_bias.items()}} if sampling.logit_bias else {}),
        **({"structured_outputs": _structured_outputs(sampling.constraint)} if sampling.constraint else {}),
    }


def _logprob_options(logprobs: int | None) -> dict[str, Any]:
    if not logprobs:
        return {} if logprobs is None else {"logprobs": 0}  # of the chosen tokens alone
    return {"logprobs": logprobs, "return_tokens_as_token_ids": True}


def _structured_outputs(constraint: Constraint) -> dict[str, Any]:
    """Return a constraint as vLLM 0.11 and later takes it (``vllm/sampling_params.py``, StructuredOutputsParams)."""
    if constraint.json_schema is not None:
        return {"json": constraint.json_schema}
    return {"grammar": constraint.grammar}


async def _parse(lines: AsyncIterator[str]) -> AsyncGenerator[dict[str, Any], None]:
    async for line in lines:
        if not line.startswith(DATA) or line == f"{DATA}[DONE]":
            continue
        try:
            event = json.loads(line.removeprefix(DATA))
        except ValueError as error:
            raise EngineError(f"The model server sent no JSON: {line[:200]!r}") from error
        if "error" in event or event.get("object") == "error":
            raise EngineError(f"The model server failed: {error_message(json.dumps(event))}")
        yield event


async def _deltas(
    events: AsyncGenerator[dict[str, Any], None], prompt_tokens: Sequence[int], asked: int | None
) -> AsyncGenerator[TokenDelta, None]:
    """Make deltas of events. The last one waits for the end of the stream, where the tokens are counted."""
    last: TokenDelta | None = None
    counted = 0
    async for event in events:
        for choice in event.get("choices") or ():
            _check_prompt(choice.get("prompt_token_ids"), prompt_tokens)
            delta = _delta(choice, asked)
            counted += len(delta.tokens) + delta.unlisted_tokens
            if delta.finish_reason is not None:
                last = delta
            elif delta.tokens or delta.text:
                yield delta
        told = (event.get("usage") or {}).get("completion_tokens")
        if last is not None and last.text is not None and told is not None:
            uncounted = told - counted
            counted = told
            last = TokenDelta((), (), last.finish_reason, last.text, last.unlisted_tokens + uncounted)
    if last is None:
        raise EngineError("The model server ended in the middle of an answer.")
    yield last


def _delta(choice: dict[str, Any], asked: int | None) -> TokenDelta:
    reason = _finish_reason(choice.get("finish_reason"))
    tokens = choice.get("token_ids")
    if tokens is None:
        text = choice.get("text") or ""
        return TokenDelta((), (), reason, text, unlisted_tokens=1 if text else 0)
    told = choice.get("logprobs") or {}
    logprobs = told.get("token_logprobs") or ()
    if asked is not None and len(logprobs) != len(tokens):
        raise EngineError(f"The model server gave {len(tokens)} tokens and {len(logprobs)} logprobs.")
    alternatives = tuple(_by_id(found) for found in told.get("top_logprobs") or ()) if asked else ()
    return TokenDelta(tuple(tokens), tuple(logprobs), reason, alternatives=alternatives)


def _by_id(found: dict[str, float] | None) -> dict[int, float]:
    named = (found or {}).items()
    return {int(name.removeprefix(TOKEN_ID)): value for name, value in named if name.startswith(TOKEN_ID)}


def _finish_reason(told: str | None) -> FinishReason | None:
    if told == "abort":
        raise EngineError("The model server gave the answer up.")
    return None if told is None else "length" if told == "length" else "stop"


def _check_prompt(told: list[int] | None, prompt_tokens: Sequence[int]) -> None:
    """Hold the prompt that the server saw against ours: it must not add tokens or cut any."""
    if told is not None and told != list(prompt_tokens):
        raise EngineError(f"The model server read {len(told)} other tokens than the prompt's {len(prompt_tokens)}.")
