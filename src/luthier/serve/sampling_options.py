"""How answers are sampled and streamed: the options that chats and completions have in common.

``top_k``, ``min_p``, ``repetition_penalty`` and ``return_token_ids`` are vLLM's: the last has the answer's tokens come
along as numbers, so that a caller can compare them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from luthier.llm.engine_interface import ALTERNATIVES
from luthier.records.completion import Constraint, Sampling
from luthier.serve.api_error import ApiError

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_BIAS = 100
DEFAULT_TEMPERATURE = 1.0
SMALLEST_TEMPERATURE = 1e-6
SMALLEST_TOP_P = 1e-6  # top_p 0 means the likeliest token alone
OTHER_SERVERS = (
    *("min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "allowed_token_ids", "prompt_logprobs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar", "json_schema"),
    *("chat_template", "chat_template_kwargs", "continue_final_message", "add_generation_prompt", "use_beam_search"),
)

Refusals = dict[str, tuple[Callable[[Any], bool], str]]
"""Fields that a request may not have: which of their values would change something, and why they are refused."""

OF_OTHER_SERVERS: Refusals = dict.fromkeys(
    OTHER_SERVERS, (lambda value: value not in (None, False, [], {}), "not supported here")
)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class SamplingOptions(BaseModel):
    """The root of requests for answers. None is what OpenAI's default is."""

    model_config = ConfigDict(extra="allow")

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    return_token_ids: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, without empty ones."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, max_tokens: int, vocabulary: int, logprobs: int | None, constraint: Constraint | None = None
    ) -> Sampling:
        """Return how an answer is sampled.

        Args:
            max_tokens: How long it may become.
            vocabulary: How many tokens the model has.
            logprobs: How many alternatives to each token are told; None tells no logprobs at all.
            constraint: What it must match.

        Raises:
            ApiError: 400, where a biased token is not one of the model.
        """
        return Sampling(
            max_tokens=max_tokens,
            temperature=_temperature(self.temperature),
            top_p=1.0 if self.top_p is None else max(self.top_p, SMALLEST_TOP_P),
            seed=self.seed,
            stop=self.stops,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logprobs=logprobs,
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=_logit_bias(self.logit_bias or {}, vocabulary),
            constraint=constraint,
        )


def _temperature(asked: float | None) -> float:
    """Return what an engine divides by; less than it can tell from nothing is nothing, the likeliest token alone."""
    if asked is None:
        return DEFAULT_TEMPERATURE
    return asked if asked >= SMALLEST_TEMPERATURE else 0.0


def several(sampling: Sampling, count: int) -> list[Sampling]:
    """Return how several answers to one prompt are sampled: with a seed, each has one of its own."""
    if sampling.seed is None:
        return [sampling] * count
    return [sampling.model_copy(update={"seed": sampling.seed + index}) for index in range(count)]


def check_engine(sampling: Sampling, options: frozenset[str], *, logprobs: str, constraint: str = "") -> None:
    """Refuse what the engine of a model cannot honour; ``logprobs`` and ``constraint`` are what a request calls these.

    Raises:
        ApiError: 400; ``param`` is the offending field.
    """
    used = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "logit_bias": sampling.logit_bias,
    }
    for name, value in used.items():
        if value and name not in options:
            refuse(name, "the engine of this model has no such option")
    if sampling.logprobs is not None and "logprobs" not in options:
        refuse("logprobs", "the engine of this model does not tell its tokens")
    if sampling.logprobs and ALTERNATIVES not in options:
        refuse(logprobs, "the engine of this model tells the chosen token's logprob alone; give 0")
    if sampling.constraint and "constraint" not in options:
        refuse(constraint, "the engine of this model cannot bind its answers")


def refuse_used(request: BaseModel, refusals: Refusals) -> None:
    """Refuse what a request has beside its own fields, where it would change an answer and cannot be done here.

    Raises:
        ApiError: 400; ``param`` is the offending field.
    """
    given = request.model_extra or {}
    for name, (is_used, why) in refusals.items():
        if is_used(given.get(name)):
            raise ApiError(400, f"{name!r}: {why}.", param=name, code="unsupported_parameter")


def refuse(param: str, why: str, code: str = "unsupported_parameter") -> NoReturn:
    """Refuse a field of a request.

    Raises:
        ApiError: 400.
    """
    raise ApiError(400, f"{param}: {why}.", param=param, code=code)


def _logit_bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    for token in given:
        if not token.isdecimal() or int(token) >= vocabulary:
            refuse("logit_bias", f"{token!r} is no token of this model, which has {vocabulary:,}", "invalid_value")
    return {int(token): bias for token, bias in given.items()}
