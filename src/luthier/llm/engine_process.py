"""One model that writes, in a process of its own: start it, ask it for tokens, cancel, close.

The process (:mod:`luthier.llm.engine.openvino_worker`) lives behind a socket pair (:mod:`luthier.llm.worker_process`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import NotFoundError
from luthier.llm.engine_interface import TokenDelta
from luthier.llm.worker_process import READY_DEADLINE_SECONDS, WorkerProcess
from luthier.records.base_model import EnginePrecision
from luthier.records.completion import Sampling

WORKER_MODULE = "luthier.llm.engine.openvino_worker"
OPTIONS = frozenset({"logprobs", "top_k", "min_p", "repetition_penalty", "constraint"})


@dataclass(frozen=True)
class EngineOptions:
    """How to run an engine.

    ``cache_gigabytes`` bounds the key-value cache. ``threads`` 0 lets the engine choose. ``precision`` is that of the
    arithmetic.
    """

    cache_gigabytes: int = 2
    threads: int = 0
    precision: EnginePrecision = "auto"

    @property
    def arguments(self) -> list[str]:
        """The options as the worker's command line has them."""
        arguments = ["--cache-gigabytes", str(self.cache_gigabytes), "--threads", str(self.threads)]
        return [*arguments, "--precision", self.precision]


class EngineProcess(WorkerProcess[TokenDelta]):
    """A running engine. Make it with :meth:`start`; all calls belong to the event loop that started it."""

    _generated_tokens = 0

    @classmethod
    async def start(
        cls,
        folder: Path,
        options: EngineOptions | None = None,
        ready_deadline_seconds: float = READY_DEADLINE_SECONDS,
    ) -> EngineProcess:
        """Start an engine on the ``model.gguf`` of a served model folder and wait until it is ready.

        Raises:
            NotFoundError: the folder has no ``model.gguf``.
            EngineError: the engine died or was not ready in time; the end of its stderr is among the problems.
        """
        if not (folder / "model.gguf").is_file():
            raise NotFoundError(f"{folder} has no model.gguf, which an engine needs.")
        arguments = (options or EngineOptions()).arguments
        return await cls._started(folder, WORKER_MODULE, arguments, ready_deadline_seconds)

    @property
    def options(self) -> frozenset[str]:
        """What of a sampling openvino-genai can honour."""
        return OPTIONS

    @property
    def context_length(self) -> int | None:
        """The model's own."""
        return None

    @property
    def generated_tokens(self) -> int:
        """How many tokens the engine has made so far, those of cancelled answers too."""
        return self._generated_tokens

    def generate(
        self, prompt_tokens: Sequence[int], sampling: Sampling, stop_tokens: Sequence[int]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Yield an answer's tokens as they come; the last delta has a finish reason.

        Closing the iterator early, or cancelling the task that reads it, cancels the answer in the engine at once.
        ``sampling.stop`` is not looked at: strings are the business of :mod:`luthier.llm.answer_stream`.

        Raises:
            EngineError: the engine refused the prompt, or it died.
        """
        message = {
            "op": "generate",
            "tokens": list(prompt_tokens),
            "sampling": sampling.model_dump(exclude={"stop": True, "constraint": {"json_schema", "is_dispatched"}}),
            "stop_tokens": list(stop_tokens),
        }
        return self._outcomes(message, lambda delta: delta.finish_reason is not None)

    def _receive(self, message: dict[str, Any]) -> None:
        for request, tokens, logprobs, finish_reason in message.get("deltas", ()):
            self._generated_tokens += len(tokens)
            self._hand(request, TokenDelta(tuple(tokens), tuple(logprobs), finish_reason))
