"""A question to a model as tokens, and its answer: what passes between any caller and any engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.records.record import Record

FinishReason = Literal["stop", "length"]


class Sampling(Record):
    """How to decode. Temperature 0 is greedy."""

    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)


class Completion(Record):
    """A model's answer. ``tokens`` and ``logprobs`` (natural log, one per token) are None where unknown."""

    text: str
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seconds: float
