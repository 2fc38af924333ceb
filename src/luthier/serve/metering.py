"""What the models do, in numbers: tokens, waiting and running requests, times. An engine is wrapped for each request.

A token costs two additions and a look at the clock; all else happens once an answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from luthier.llm.engine_interface import Encoder, Engine, RunningModel, TokenDelta
from luthier.records.completion import Sampling
from luthier.serve.deadline import Deadline
from luthier.serve.usage import USAGE, Usage

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
Running = TypeVar("Running", bound=RunningModel)
PROMPT, COMPLETION = "prompt", "completion"


class ModelMetrics:
    """Counters, gauges and histograms per model, by the name that it was asked by."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model",)
        self.tokens = Counter(
            "luthier_tokens", "Tokens read (prompt) and made (completion).", (*model, "kind"), registry=self.registry
        )
        self.waiting = Gauge(
            "luthier_requests_waiting", "Requests that wait for their model to load.", model, registry=self.registry
        )
        self.running = Gauge("luthier_answers_in_flight", "Answers that are being made.", model, registry=self.registry)
        self.first_token = Histogram(
            "luthier_time_to_first_token_seconds",
            "From the arrival of a request to the first token of an answer.",
            model,
            registry=self.registry,
            buckets=FIRST_TOKEN_BUCKETS,
        )
        self.per_token = Histogram(
            "luthier_time_per_output_token_seconds",
            "Between two tokens of an answer, on average over the answer.",
            model,
            registry=self.registry,
            buckets=PER_TOKEN_BUCKETS,
        )

    @contextmanager
    def wait_for(self, model: str) -> Iterator[None]:
        """Count a request as waiting, and note in its usage which model it asks."""
        if (usage := USAGE.get()) is not None:
            usage.model = model
        with self.waiting.labels(model).track_inprogress():
            yield

    def count_prompt(self, model: str, prompt_tokens: Sequence[int]) -> None:
        """Count a prompt, once for all answers of a request to it."""
        usage = USAGE.get()
        if usage is None or usage.add_prompt(prompt_tokens):
            self.tokens.labels(model, PROMPT).inc(len(prompt_tokens))


class _Metered(Generic[Running]):
    """A running model, for one request."""

    def __init__(self, engine: Running, model: str, metrics: ModelMetrics, deadline: Deadline) -> None:
        self._engine = engine
        self._model = model
        self._metrics = metrics
        self._deadline = deadline

    @property
    def alive(self) -> bool:
        """Whether it can take requests."""
        return self._engine.alive

    @property
    def in_flight(self) -> int:
        """How many requests are being answered or wait for it."""
        return self._engine.in_flight

    @property
    def memory_bytes(self) -> int:
        """How much of this machine's memory it holds now."""
        return self._engine.memory_bytes

    async def close(self) -> None:
        """Free the model."""
        await self._engine.close()


class MeteredEncoder(_Metered[Encoder]):
    """An encoder whose texts are counted."""

    async def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors of texts as the encoder does.

        Raises:
            EngineError: the encoder refused a text, or it died.
            ApiError: 504, where the request's deadline has come.
        """
        for text in texts:
            self._metrics.count_prompt(self._model, text)
        with self._metrics.running.labels(self._model).track_inprogress():
            async with self._deadline.within():
                return await self._engine.embed(texts)


class MeteredEngine(_Metered[Engine]):
    """An engine whose answers are counted and timed."""

    @property
    def options(self) -> frozenset[str]:
        """What of a sampling the engine can honour."""
        return self._engine.options

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt and its answer may have together."""
        return self._engine.context_length

    @property
    def generated_tokens(self) -> int:
        """How many tokens the engine has made so far."""
        return self._engine.generated_tokens

    async def generate(
        self, prompt_tokens: Sequence[int], sampling: Sampling, stop_tokens: Sequence[int]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Yield an answer's tokens as the engine does.

        Raises:
            EngineError: the engine refused the prompt, or it died.
            BusyError: the engine has no room for a further request now.
            InputError: the engine cannot answer such a request.
            ApiError: 504, where the request's deadline has come.
        """
        usage = USAGE.get() or Usage()
        self._metrics.count_prompt(self._model, prompt_tokens)
        first = last = 0.0
        made = 0
        with self._metrics.running.labels(self._model).track_inprogress():
            try:
                answer = self._engine.generate(prompt_tokens, sampling, stop_tokens)
                async with aclosing(self._deadline.limit(answer)) as deltas:
                    async for delta in deltas:
                        last = time.perf_counter()
                        if not first:
                            first = last
                            self._time_first(usage, first - usage.started)
                        new = len(delta.tokens) + delta.unlisted_tokens
                        made += new
                        usage.completion_tokens += new  # now: the request may be over before this iterator is closed
                        yield delta
            finally:
                self._metrics.tokens.labels(self._model, COMPLETION).inc(made)
                if made > 1:
                    self._metrics.per_token.labels(self._model).observe((last - first) / (made - 1))

    def _time_first(self, usage: Usage, seconds: float) -> None:
        if usage.first_token_seconds is None:
            usage.first_token_seconds = seconds
        self._metrics.first_token.labels(self._model).observe(seconds)
