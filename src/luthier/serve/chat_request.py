"""What a client may ask of ``/chat/completions``, and which of it is refused rather than quietly ignored.

A JSON object comes in; a :class:`ChatRequest` goes out, or an :class:`ApiError` that names the field. Unknown fields
are tolerated, as clients send many that do not change an answer (``user``, ``service_tier`` …).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.records.example import Message, Role
from luthier.records.stored import Metadata
from luthier.serve.api_error import ApiError

MAX_CHOICES = 128
MAX_STOPS = 4
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (bool, "tools"),
    "functions": (bool, "functions"),
    "tool_choice": (lambda value: value not in (None, "none", "auto"), "a forced tool call"),
    "function_call": (lambda value: value not in (None, "none", "auto"), "a forced function call"),
    "response_format": (lambda value: _field(value, "type") not in (None, "text"), "a response format other than text"),
    "logit_bias": (bool, "a logit bias"),
    "top_logprobs": (bool, "alternatives to the chosen token (top_logprobs above 0)"),
    "modalities": (lambda value: value not in (None, ["text"]), "a modality other than text"),
    "audio": (bool, "audio"),
    "web_search_options": (lambda value: value is not None, "a web search"),
}


class TextPart(BaseModel):
    """A piece of a message's content; only text is known."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn as OpenAI writes it."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def as_message(self) -> Message:
        """Return the turn as a record; "developer" is the newer word for "system"."""
        role: Role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role=role, content=self.content)
        return Message(role=role, content="".join(part.text for part in self.content or ()))


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """A request for one or more answers to a conversation. None is what OpenAI's default is.

    ``return_token_ids`` is vLLM's: the answer's tokens come along as numbers, so that a caller can compare them.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logprobs: bool | None = None
    store: bool | None = None
    metadata: Metadata | None = None
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


def refuse_unsupported(request: ChatRequest) -> None:
    """Refuse what would change an answer and cannot be done here.

    Raises:
        ApiError: 400; ``param`` is the path of the offending field.
    """
    given = request.model_extra or {}
    for name, (is_used, what) in REFUSED.items():
        if is_used(given.get(name)):
            raise ApiError(400, f"{name!r}: {what} is not supported here.", param=name, code="unsupported_parameter")
    for index, message in enumerate(request.messages):
        if message.content is None and not (message.model_extra or {}).get("tool_calls"):
            param = f"messages[{index}].content"
            raise ApiError(400, f"{param}: Field required", param=param, code="missing_required_parameter")
        for name in ("tool_calls", "function_call", "audio"):
            if (message.model_extra or {}).get(name):
                param = f"messages[{index}].{name}"
                raise ApiError(400, f"{param}: not supported here.", param=param, code="unsupported_parameter")


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
