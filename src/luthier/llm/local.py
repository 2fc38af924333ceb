"""A served model folder as a :class:`luthier.llm.model.LanguageModel`, for callers that do not know asyncio.

An engine process answers; an event loop in a background thread talks to it. Prompts go in all at once, because the
engine is several times faster when it can batch.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from luthier.errors import EngineError, InputError
from luthier.llm.answer_stream import AnswerDelta, stream_answer
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.llm.model import OnAnswer, Prompt
from luthier.records.completion import Completion, FinishReason, Sampling
from luthier.templates.chat_format import ChatFormat

MAX_IN_FLIGHT = 256
Result = TypeVar("Result")
Finished = tuple[int, Completion]


class LocalModel:
    """A model on this machine, in an engine process of its own.

    Args:
        folder: A served model folder: ``model.gguf``, ``tokenizer.json`` and the other files of a chat format.
        name: The name that a person knows the model by.
        options: How to run the engine.

    Raises:
        NotFoundError: the folder has no tokenizer or no ``model.gguf``.
        EngineError: the engine cannot run the model.
    """

    def __init__(self, folder: Path, name: str, options: EngineOptions | None = None) -> None:
        self._name = name
        self._format = ChatFormat.load(folder)
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"engine of {name}", daemon=True)
        self._thread.start()
        try:
            self._engine = self._submit(EngineProcess.start(folder, options)).result()
        except BaseException:
            self._stop_loop()
            raise

    @property
    def name(self) -> str:
        """The name that a person knows the model by."""
        return self._name

    @property
    def chat_format(self) -> ChatFormat:
        """How the model writes a conversation."""
        return self._format

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_answer: OnAnswer | None = None
    ) -> list[Completion]:
        """Return one completion per prompt, in the prompts' order.

        ``on_answer(index, completion)`` is called in the caller's thread as each one finishes, in any order. An
        answer that would leave the context ends at its edge, with the finish reason "length".

        Raises:
            InputError: prompts do not fit the model's context; all of them are named, and none is asked.
            EngineError: the engine failed.
        """
        tokens = self._prompt_tokens(prompts)
        finished: queue.SimpleQueue[Finished | None] = queue.SimpleQueue()
        future = self._submit(self._answer_all(tokens, sampling, finished))
        future.add_done_callback(lambda _: finished.put(None))
        completions: dict[int, Completion] = {}
        try:
            while (item := finished.get()) is not None:
                completions[item[0]] = item[1]
                if on_answer is not None:
                    on_answer(*item)
        finally:
            future.cancel()
        future.result()
        return [completions[index] for index in range(len(prompts))]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the text of one answer as it comes, in whole characters.

        Raises:
            InputError: the prompt does not fit the model's context.
            EngineError: the engine failed.
        """
        (tokens,) = self._prompt_tokens([prompt])
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        future = self._submit(self._stream_into(pieces, tokens, sampling))
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                if piece:
                    yield piece
        finally:
            future.cancel()
        future.result()

    def close(self) -> None:
        """End the engine process; further calls are errors. May be called twice."""
        if not self._closed:
            self._submit(self._engine.close()).result()
            self._closed = True
            self._stop_loop()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._closed:
            work.close()
            raise EngineError(f"The model {self._name} is closed.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _prompt_tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        tokens = [self._format.prompt_tokens(prompt) for prompt in prompts]
        context = self._format.context_length
        problems = [
            f"prompt {number}: {len(prompt)} tokens"
            for number, prompt in enumerate(tokens, 1)
            if len(prompt) >= context
        ]
        if problems:
            raise InputError(
                f"{len(problems)} of {len(prompts)} prompts leave no room for an answer in the context of {context} "
                f"tokens of {self._name}.",
                problems=problems,
            )
        return tokens

    def _answer_stream(self, prompt_tokens: list[int], sampling: Sampling) -> AsyncGenerator[AnswerDelta, None]:
        room = self._format.context_length - len(prompt_tokens)
        bounded = sampling.model_copy(update={"max_tokens": min(sampling.max_tokens, room)})
        return stream_answer(self._engine, self._format, prompt_tokens, bounded)

    async def _answer_all(
        self, prompts: list[list[int]], sampling: Sampling, finished: queue.SimpleQueue[Finished | None]
    ) -> None:
        gate = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def answer(index: int) -> None:
            async with gate:
                finished.put((index, await self._answer_one(prompts[index], sampling)))

        tasks = [asyncio.create_task(answer(index)) for index in range(len(prompts))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer_one(self, prompt_tokens: list[int], sampling: Sampling) -> Completion:
        started = time.perf_counter()
        text = ""
        tokens: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason = "stop"
        async for delta in self._answer_stream(prompt_tokens, sampling):
            text += delta.text
            tokens += delta.tokens
            logprobs += delta.logprobs
            reason = delta.finish_reason or reason
        return Completion(
            text=text,
            tokens=tuple(tokens),
            logprobs=tuple(logprobs),
            finish_reason=reason,
            prompt_tokens=len(prompt_tokens),
            completion_tokens=len(tokens),
            seconds=time.perf_counter() - started,
        )

    async def _stream_into(
        self, pieces: queue.SimpleQueue[str | None], prompt_tokens: list[int], sampling: Sampling
    ) -> None:
        async with aclosing(self._answer_stream(prompt_tokens, sampling)) as deltas:
            async for delta in deltas:
                pieces.put(delta.text)
