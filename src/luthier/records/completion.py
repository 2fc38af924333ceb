"""A question to a model as tokens, and its answer: what passes between any caller and any engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from luthier.records.record import Record

FinishReason = Literal["stop", "length"]


class Constraint(Record):
    """What an answer must match: a grammar, in the EBNF that xgrammar and llama.cpp read.

    ``json_schema`` is the schema that the grammar was made of, where it was. ``is_dispatched`` says that the grammar
    has a rule of xgrammar's own, for text in which some words lead to other rules.
    """

    grammar: str
    json_schema: Any = None
    is_dispatched: bool = False


class Sampling(Record):
    """How to decode. Temperature 0 is greedy.

    ``logprobs`` asks for the log probability of each token, and for that many alternatives to it; None asks for none.
    ``top_k`` and ``min_p`` leave out unlikely tokens (https://arxiv.org/abs/2407.01082), and ``repetition_penalty``
    divides the logits of those that were there before (https://arxiv.org/abs/1909.05858). ``logit_bias`` is added to
    the logits of its tokens. Not every engine has all of them: see ``Engine.options``.
    """

    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logprobs: int | None = Field(0, ge=0)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    constraint: Constraint | None = None


class Completion(Record):
    """A model's answer. ``tokens`` and ``logprobs`` (natural log, one per token) are None where unknown."""

    text: str
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seconds: float
