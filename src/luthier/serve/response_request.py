"""What a client may ask of ``/responses``, and the chat that it stands for.

A request becomes a :class:`~luthier.serve.chat_request.ChatRequest`, so that both APIs honour the same options in the
same way; what a chat refuses is refused here under the name that this API has for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.records.response import Item
from luthier.records.stored import Metadata
from luthier.serve import chat_request
from luthier.serve.api_error import ApiError
from luthier.serve.chat_request import ChatRequest
from luthier.serve.field_errors import field_error
from luthier.serve.response_items import InputItem, chat_messages

MAX_ITEMS = 4096
MAX_TOP_LOGPROBS = 20
LOGPROBS = "message.output_text.logprobs"
OF_CHATS = (
    *("messages", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "response_format", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "logprobs", "functions", "function_call", "reasoning_effort"),
    *("verbosity", "modalities", "audio", "top_k", "min_p", "repetition_penalty"),
)
UNSET: tuple[Any, ...] = (None, False, [], {})
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "background": (bool, "responses are answered at once here"),
    "conversation": (lambda value: value is not None, "go on with previous_response_id instead"),
    "context_management": (bool, "nothing is left out of a conversation here"),
    "truncation": (lambda value: value not in (None, "disabled"), "nothing is left out of a conversation here"),
    "prompt": (lambda value: value is not None, "there are no kept prompts here"),
    "moderation": (lambda value: value is not None, "there is no moderation here"),
    **dict.fromkeys(OF_CHATS, (lambda value: value not in UNSET, "it is no option of responses")),
}
# What a chat calls a field, and what responses call it.
RENAMED = (
    (re.compile(r"messages.*"), "input"),
    (re.compile(r"max_completion_tokens"), "max_output_tokens"),
    (re.compile(r"response_format\.json_schema(\..*)?"), r"text.format\1"),
    (re.compile(r"response_format(\..*)?"), r"text.format\1"),
    (re.compile(r"tools\[(\d+)\]\.function(\..*)"), r"tools[\1]\2"),
    (re.compile(r"tool_choice\..*"), "tool_choice"),
    (re.compile(r"reasoning_effort"), "reasoning.effort"),
    (re.compile(r"verbosity"), "text.verbosity"),
)


class _Options(BaseModel):
    model_config = ConfigDict(extra="allow")


class TextFormat(_Options):
    """What an answer must be; a schema has a name."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(_Options):
    """How an answer is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(_Options):
    """How a model thinks before it answers; none does here."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class FunctionTool(_Options):
    """A function that may be called; ``parameters`` is the JSON schema of its arguments."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(_Options):
    """A function by its name."""

    type: Literal["function"]
    name: str


class AllowedTools(_Options):
    """Some of the functions, of which one may or must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


NamedChoice = Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


class StreamOptions(_Options):
    """Options of a streamed response; nothing is obfuscated here."""

    include_obfuscation: bool | None = None


class ResponseRequest(_Options):
    """A request for a response. None is what OpenAI's default is."""

    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[str] | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept, so that another can go on from it: yes, unless the client says no."""
        return self.store is not False

    @property
    def shows_logprobs(self) -> bool:
        """Whether the tokens' logprobs are told."""
        return LOGPROBS in (self.include or ())

    def chat(self, items: Sequence[Item]) -> ChatRequest:
        """Return the chat that this request and the items of its conversation stand for.

        Raises:
            ApiError: 400; ``param`` is the path of the offending field.
        """
        text, reasoning = self.text or TextOptions(), self.reasoning or Reasoning()
        options = {
            "model": self.model,
            "messages": chat_messages(self.instructions, items),
            "stream_options": {"include_usage": True},
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.shows_logprobs or None,
            "top_logprobs": self.top_logprobs if self.shows_logprobs else None,
            "response_format": _response_format(text.format),
            "tools": [_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": _tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "service_tier": self.service_tier,
            "verbosity": text.verbosity,
            "reasoning_effort": reasoning.effort,
        }
        with renamed():
            try:
                asked = ChatRequest.model_validate(
                    {name: value for name, value in options.items() if value is not None}
                )
            except ValidationError as error:
                raise field_error(error.errors()) from error
            chat_request.refuse_unsupported(asked)
        return asked


def refuse_unsupported(request: ResponseRequest) -> None:
    """Refuse what would change an answer and cannot be done here; the chat refuses the rest.

    Raises:
        ApiError: 400; ``param`` is the path of the offending field.
    """
    given = request.model_extra or {}
    for name, (is_used, why) in REFUSED.items():
        if is_used(given.get(name)):
            _refuse(name, why)
    for index, wanted in enumerate(request.include or ()):
        if wanted != LOGPROBS:
            _refuse("include", f"include[{index}] {wanted!r} is not supported; {LOGPROBS!r} is")
    if request.top_logprobs and not request.shows_logprobs:
        _refuse("top_logprobs", f"it needs {LOGPROBS!r} in include", code="invalid_value")
    reasoning = request.reasoning
    if reasoning and (reasoning.summary or reasoning.generate_summary):
        _refuse("reasoning.summary", "these models answer without reasoning first")


@contextmanager
def renamed() -> Iterator[None]:
    """Have a chat's errors name the fields as responses call them.

    Raises:
        ApiError: as raised inside.
    """
    try:
        yield
    except ApiError as error:
        if error.param is None:
            raise
        known = next(((pattern, name) for pattern, name in RENAMED if pattern.fullmatch(error.param)), None)
        if known is None:
            raise
        param = known[0].sub(known[1], error.param)
        message = error.message.replace(error.param, param)
        raise ApiError(error.status, message, error.type, param, error.code) from error


def _response_format(asked: TextFormat | None) -> dict[str, Any] | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "json_object"}
    schema = asked.model_dump(by_alias=True, exclude_none=True, include={"name", "description", "schema_", "strict"})
    return {"type": "json_schema", "json_schema": schema}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    told = tool.model_dump(exclude_none=True, include={"name", "description", "parameters", "strict"})
    return {"type": "function", "function": told}


def _tool_choice(choice: str | NamedTool | AllowedTools | None) -> Any:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": [_tool_choice(tool) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _refuse(param: str, why: str, code: str = "unsupported_parameter") -> None:
    raise ApiError(400, f"{param}: {why}.", param=param, code=code)
