"""What a client may ask of ``/completions``, and which of it is refused rather than quietly ignored."""

from __future__ import annotations

from pydantic import Field

from luthier.llm.engine_interface import ALTERNATIVES
from luthier.records.completion import Sampling
from luthier.serve.sampling_options import (
    OF_OTHER_SERVERS,
    Refusals,
    SamplingOptions,
    check_engine,
    refuse,
    refuse_used,
)
from luthier.serve.text_input import Texts

DEFAULT_MAX_TOKENS = 16
MAX_BEST_OF = 20
MAX_LOGPROBS = 5
MAX_ANSWERS = 2048
IN_CHATS = "not supported here; /v1/chat/completions takes response_format"
REFUSED: Refusals = OF_OTHER_SERVERS | {
    "response_format": (lambda value: value not in (None, {"type": "text"}), IN_CHATS),
    "guided_json": (lambda value: value is not None, IN_CHATS),
}


class CompletionRequest(SamplingOptions):
    """A request to go on with one or more prompts. None is what OpenAI's default is."""

    model: str
    prompt: Texts | None = None
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1, le=MAX_BEST_OF)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    user: str | None = None

    @property
    def answers(self) -> int:
        """How many answers a prompt gets."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """How many answers to a prompt are made, of which the best are given."""
        return self.best_of or self.answers

    @property
    def is_greedy(self) -> bool:
        """Whether the chosen token is always the model's likeliest one."""
        changed = (self.presence_penalty, self.frequency_penalty, self.logit_bias)
        return self.temperature == 0 and not any(changed) and self.repetition_penalty in (None, 1)

    @property
    def shows_tokens(self) -> bool:
        """Whether each token is told, also one that is a part of a character."""
        return self.logprobs is not None or bool(self.return_token_ids)

    def bounded(self, room: int, vocabulary: int, options: frozenset[str]) -> Sampling:
        """Return how an answer is sampled by an engine with ``options``, where ``room`` is left in the context.

        Raises:
            ApiError: 400, where the engine cannot honour an option.
        """
        logprobs = 0 if self.logprobs is None and self.candidates > self.answers else self.logprobs
        if logprobs == 1 and self.is_greedy and ALTERNATIVES not in options:
            logprobs = 0  # the likeliest token is the chosen one
        sampling = self.sampling(min(self.max_tokens or DEFAULT_MAX_TOKENS, room), vocabulary, logprobs)
        check_engine(sampling, options, logprobs="logprobs")
        return sampling


def refuse_unsupported(request: CompletionRequest) -> None:
    """Refuse what would change an answer and cannot be done here, and options that contradict each other.

    Raises:
        ApiError: 400; ``param`` is the offending field.
    """
    refuse_used(request, REFUSED)
    if request.suffix:
        refuse("suffix", "text cannot be inserted before a suffix here")
    if request.echo and request.logprobs is not None:
        refuse("logprobs", "the logprobs of a prompt's tokens are not known, so they cannot be echoed")
    if request.candidates < request.answers:
        refuse("best_of", f"it is {request.best_of}, and n is {request.answers}", code="invalid_value")
    if request.stream and request.candidates > request.answers:
        refuse("best_of", "the best answers are known at the end, and cannot be streamed")
    total = len(request.prompt or [""]) * request.candidates
    if total > MAX_ANSWERS:
        what = "best_of" if request.best_of else "n"
        refuse(what, f"{total} answers in all; {MAX_ANSWERS} at most", code="invalid_value")
