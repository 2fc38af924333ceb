"""What a client may ask of ``/chat/completions``, and which of it is refused rather than quietly ignored.

A JSON object comes in; a :class:`ChatRequest` goes out, or an :class:`ApiError` that names the field. Unknown fields
are tolerated, as clients send many that do not change an answer (``user``, ``service_tier`` …).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from luthier.records.example import Message, Role, Tool, ToolCall
from luthier.records.stored import Metadata
from luthier.serve.api_error import ApiError
from luthier.serve.sampling_options import OF_OTHER_SERVERS, Refusals, SamplingOptions, refuse_used

MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
FUNCTION_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
REFUSED: Refusals = {
    "functions": (bool, "functions are deprecated at OpenAI; give them as tools"),
    "function_call": (lambda value: value not in (None, "none", "auto"), "deprecated at OpenAI; give tool_choice"),
    "modalities": (lambda value: value not in (None, ["text"]), "only text comes out of these models"),
    "audio": (bool, "only text comes out of these models"),
    "web_search_options": (lambda value: value is not None, "there is no web search here"),
    "moderation": (lambda value: value is not None, "there is no moderation here"),
    "reasoning_effort": (lambda value: value not in (None, "none"), "these models answer without reasoning first"),
    "verbosity": (lambda value: value not in (None, "medium"), "these models have no such setting"),
    **OF_OTHER_SERVERS,
    "guided_json": (lambda value: value is not None, "not supported here; give response_format"),
}


class TextPart(BaseModel):
    """A piece of a message's content; only text is known."""

    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    """A piece of what an assistant refused with."""

    type: Literal["refusal"]
    refusal: str


def _type_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _kind_of_part(value: Any) -> str:
    return f"part {_type_of(value) or 'text'}"


# Tags are no identifiers, so that errors do not take them for names of fields.
Part = Annotated[
    Annotated[TextPart, Tag("part text")] | Annotated[RefusalPart, Tag("part refusal")], Discriminator(_kind_of_part)
]


class CalledFunction(BaseModel):
    """The function of a call, with its arguments as JSON text."""

    name: str
    arguments: str


class CallParam(BaseModel):
    """A call that an assistant asked for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One turn as OpenAI writes it."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    refusal: str | None = None
    tool_calls: list[CallParam] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text; a refusal is what an assistant said too."""
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            return (self.role == "assistant" and self.refusal) or ""
        return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in self.content)

    def as_message(self) -> Message:
        """Return the turn as a record; "developer" is the newer word for "system"."""
        role: Role = "system" if self.role == "developer" else self.role
        if role == "tool":
            return Message(role=role, content=self.text, tool_call_id=self.tool_call_id, name=self.name)
        called = self.tool_calls or () if role == "assistant" else ()
        calls = (ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments) for call in called)
        return Message(role=role, content=self.text, tool_calls=tuple(calls))


class FunctionParam(BaseModel):
    """A function that may be called; ``parameters`` is the JSON schema of its arguments."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParam(BaseModel):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: FunctionParam

    def as_tool(self) -> Tool:
        """Return the tool as a chat template shows it to its model."""
        return {"type": "function", "function": self.function.model_dump(exclude_unset=True, exclude={"strict"})}


class NamedFunction(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """A tool by its name."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    """Some of the tools, of which one may or must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(BaseModel):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str:
    return "AllowedChoice" if _type_of(value) == "allowed_tools" else "NamedTool"


ToolChoice = Annotated[
    Annotated[NamedTool, Tag("NamedTool")] | Annotated[AllowedChoice, Tag("AllowedChoice")],
    Discriminator(_kind_of_choice),
]


class ResponseFormat(BaseModel):
    """What an answer must be; ``json_schema`` has a name, and the schema under ``schema``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatRequest(SamplingOptions):
    """A request for one or more answers to a conversation. None is what OpenAI's default is."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    service_tier: str | None = None
    store: bool | None = None
    metadata: Metadata | None = None


def refuse_unsupported(request: ChatRequest) -> None:
    """Refuse what would change an answer and cannot be done here, and what contradicts itself.

    Raises:
        ApiError: 400; ``param`` is the path of the offending field.
    """
    refuse_used(request, REFUSED)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs", code="invalid_value")
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")


def _check_message(message: ChatMessage, place: str) -> None:
    if message.role == "tool" and message.tool_call_id is None:
        _missing(f"{place}.tool_call_id")
    if message.content is None and not (message.role == "assistant" and (message.tool_calls or message.refusal)):
        if "content" in message.model_fields_set:
            param = f"{place}.content"
            what = f"{param}: must be a text or a list of parts in a turn of the role {message.role!r}, not null"
            raise ApiError(400, what, param=param, code="invalid_value")
        _missing(f"{place}.content")
    if message.tool_calls and message.role != "assistant":
        what = f"{place}.tool_calls: only an assistant's turn has them"
        raise ApiError(400, what, param=f"{place}.tool_calls", code="invalid_value")
    for name in ("function_call", "audio"):
        if (message.model_extra or {}).get(name):
            param = f"{place}.{name}"
            raise ApiError(400, f"{param}: not supported here.", param=param, code="unsupported_parameter")


def _missing(param: str) -> None:
    raise ApiError(400, f"{param}: Field required", param=param, code="missing_required_parameter")
