"""What a client may ask of ``/completions``, and which of it is refused rather than quietly ignored."""

from __future__ import annotations

from typing import Annotated, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from luthier.records.completion import Sampling
from luthier.serve.api_error import ApiError
from luthier.serve.chat import DEFAULT_TEMPERATURE, SMALLEST_TOP_P
from luthier.serve.chat_request import MAX_CHOICES, MAX_STOPS, StreamOptions
from luthier.serve.text_input import Texts

DEFAULT_MAX_TOKENS = 16
MAX_BEST_OF = 20
MAX_LOGPROBS = 5
MAX_ANSWERS = 2048


class CompletionRequest(BaseModel):
    """A request to go on with one or more prompts. None is what OpenAI's default is.

    ``return_token_ids`` is vLLM's: the answer's tokens come along as numbers, so that a caller can compare them.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: Texts | None = None
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_BEST_OF)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    return_token_ids: bool | None = None

    @property
    def answers(self) -> int:
        """How many answers a prompt gets."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """How many answers to a prompt are made, of which the best are given."""
        return self.best_of or self.answers

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, index: int) -> Sampling:
        """Return how a candidate answer to a prompt is sampled."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, SMALLEST_TOP_P),
            seed=None if self.seed is None else self.seed + index,
            stop=tuple(stop for stop in stops if stop),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
        )


def refuse_unsupported(request: CompletionRequest) -> None:
    """Refuse what would change an answer and cannot be done here, and options that contradict each other.

    Raises:
        ApiError: 400; ``param`` is the offending field.
    """
    if request.suffix:
        _refuse("suffix", "text cannot be inserted before a suffix here")
    if request.logit_bias:
        _refuse("logit_bias", "a logit bias is not supported here")
    if request.logprobs and not (request.logprobs == 1 and _is_greedy(request)):
        _refuse("logprobs", "only the chosen token's logprob is known: give 0, or 1 with temperature 0 and no penalty")
    if request.echo and request.logprobs is not None:
        _refuse("logprobs", "the logprobs of a prompt's tokens are not known, so they cannot be echoed")
    if request.candidates < request.answers:
        _refuse("best_of", f"it is {request.best_of}, and n is {request.answers}", code="invalid_value")
    if request.stream and request.candidates > request.answers:
        _refuse("best_of", "the best answers are known at the end, and cannot be streamed")
    total = len(request.prompt or [""]) * request.candidates
    if total > MAX_ANSWERS:
        what = "best_of" if request.best_of else "n"
        _refuse(what, f"{total} answers in all; {MAX_ANSWERS} at most", code="invalid_value")


def _is_greedy(request: CompletionRequest) -> bool:
    """Whether the chosen token is the likeliest one."""
    return request.temperature == 0 and not request.presence_penalty and not request.frequency_penalty


def _refuse(param: str, why: str, code: str = "unsupported_parameter") -> NoReturn:
    raise ApiError(400, f"{param}: {why}.", param=param, code=code)
