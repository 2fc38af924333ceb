"""What every engine can do: tokens in, tokens out, cancelled by closing. What an encoder can: tokens in, vectors out.

Two things implement :class:`Engine`: a process of openvino-genai on this machine (:mod:`luthier.llm.engine_process`),
and a server that speaks OpenAI's API, such as vLLM (:mod:`luthier.llm.remote_engine`). Neither ever sees a
conversation: the renderer (:mod:`luthier.templates.chat_format`) has made tokens of it, the same ones as in training.
One implements :class:`Encoder`: a process of torch on this machine (:mod:`luthier.llm.encoder_process`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.records.completion import FinishReason, Sampling


class TokenDelta(NamedTuple):
    """What one step added to an answer; the last delta of an answer has the finish reason.

    ``logprobs`` are natural logarithms under the model itself, before temperature and top_p; none where they were not
    asked for, or the engine does not tell them. ``alternatives`` has, for each token, the likeliest ones with their
    logprobs, where the sampling asks for them. An engine that tells no tokens gives ``text`` in their place, and says
    in ``unlisted_tokens`` how many tokens it counted.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    text: str | None = None
    unlisted_tokens: int = 0
    alternatives: tuple[dict[int, float], ...] = ()


ALTERNATIVES = "alternatives"
"""The option to tell the likeliest tokens beside the chosen one: ``logprobs`` above 0."""


class RunningModel(Protocol):
    """A model that is running. All calls belong to the event loop that started it."""

    @property
    def alive(self) -> bool:
        """Whether it can take requests."""
        ...

    @property
    def in_flight(self) -> int:
        """How many requests are being answered or wait for it."""
        ...

    @property
    def memory_bytes(self) -> int:
        """How much of this machine's memory it holds now; 0 where it runs elsewhere."""
        ...

    async def close(self) -> None:
        """Free the model; requests still in flight raise EngineError. May be called twice."""
        ...


class Engine(RunningModel, Protocol):
    """A model that writes."""

    @property
    def options(self) -> frozenset[str]:
        """What of a sampling it can honour beyond temperature, top_p, seed, limits and the two penalties.

        These are names of fields, and :data:`ALTERNATIVES`. It is not asked for anything else.
        """
        ...

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt and its answer may have together; None leaves it to the model."""
        ...

    @property
    def generated_tokens(self) -> int:
        """How many tokens the engine has made so far, those of cancelled answers too."""
        ...

    def generate(
        self, prompt_tokens: Sequence[int], sampling: Sampling, stop_tokens: Sequence[int]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Yield an answer's tokens as they come; the last delta has a finish reason.

        Closing the iterator early, or cancelling the task that reads it, cancels the answer in the engine at once.
        ``sampling.stop`` is not looked at: strings are the business of :mod:`luthier.llm.answer_stream`.

        Raises:
            EngineError: the engine refused the prompt, or it died.
            InputError: the engine cannot answer such a request.
            BusyError: the engine has no room for a further request now.
        """
        ...


class Encoder(RunningModel, Protocol):
    """A model that reads, and makes vectors of texts."""

    async def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector of length 1 for each text, which is given as tokens: (texts, dimensions).

        Cancelling the task that waits drops what is not computed yet.

        Raises:
            EngineError: the encoder refused a text, or it died.
        """
        ...
