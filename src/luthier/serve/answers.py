"""The answers to one or several prompts, all at once, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from luthier.llm.answer_stream import AnswerDelta, stream_answer
from luthier.records.completion import Sampling
from luthier.serve.pool import LoadedModel


@dataclass
class Choice:
    """One answer as far as it has come."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] = field(default_factory=list)
    token_count: int = 0
    finish_reason: str | None = None

    def add(self, delta: AnswerDelta) -> None:
        """Take what is new."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.alternatives += delta.alternatives
        self.token_count += delta.token_count
        self.finish_reason = delta.finish_reason or self.finish_reason


@dataclass(frozen=True)
class Question:
    """A prompt, and how its answer is sampled; its special tokens have text ``with_special``."""

    prompt_tokens: Sequence[int]
    sampling: Sampling
    with_special: bool = False


async def answer_all(
    loaded: LoadedModel, questions: Sequence[Question]
) -> AsyncGenerator[tuple[int, AnswerDelta], None]:
    """Yield (index of the question, delta) of all answers as they come; closing it cancels them all.

    Raises:
        EngineError: the engine refused a prompt, or it died.
        BusyError: the engine has no room for a further request now.
        InputError: the engine cannot answer such a request.
    """
    if len(questions) == 1:
        async with aclosing(_deltas(loaded, questions[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    arrivals: asyncio.Queue[tuple[int, AnswerDelta] | Exception] = asyncio.Queue()
    tasks = [asyncio.create_task(_answer(loaded, index, one, arrivals)) for index, one in enumerate(questions)]
    unfinished = len(tasks)
    try:
        while unfinished:
            arrival = await arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            unfinished -= arrival[1].finish_reason is not None
            yield arrival
    finally:
        for task in tasks:
            task.cancel()


async def _answer(
    loaded: LoadedModel, index: int, question: Question, arrivals: asyncio.Queue[tuple[int, AnswerDelta] | Exception]
) -> None:
    try:
        async with aclosing(_deltas(loaded, question)) as deltas:
            async for delta in deltas:
                arrivals.put_nowait((index, delta))
    except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
        arrivals.put_nowait(error)


def _deltas(loaded: LoadedModel, question: Question) -> AsyncGenerator[AnswerDelta, None]:
    return stream_answer(
        loaded.engine,
        loaded.chat_format,
        question.prompt_tokens,
        question.sampling,
        with_special=question.with_special,
    )
