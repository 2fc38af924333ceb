"""How families of models write the calls of functions that they ask for, told by their chat templates.

The template says how calls are rendered; it does not say how an answer is read, so a table does. A template that
knows ``tools`` and is not in the table can be trained on, and its answers come as text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.errors import InputError
from luthier.records.example import Message

SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
SHORT_ID_LETTERS = 9


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written.

    Args:
        name: The family that began with it.
        layout: Each call between tags ("tagged"), an array of calls behind a tag ("array"), or one call as the whole
            answer ("alone").
        opening: What comes before a call, or the array.
        closing: What comes behind it.
        arguments_key: What the arguments are called.
        marks: Texts that all are in the chat template.
        unless: Texts of which none is in it: they belong to a younger format.
        short_ids: Whether the ids of calls must have nine letters.
    """

    name: str
    layout: Literal["tagged", "array", "alone"]
    opening: str
    closing: str
    arguments_key: str
    marks: tuple[str, ...]
    unless: tuple[str, ...] = ()
    short_ids: bool = False


TOOL_FORMATS = (
    ToolFormat(
        name="hermes",  # Hermes 2 Pro, Qwen 2.5, Qwen 3
        layout="tagged",
        opening="<tool_call>",
        closing="</tool_call>",
        arguments_key="arguments",
        marks=("<tool_call>",),
        unless=("<function=", "<arg_key>"),
    ),
    ToolFormat(
        name="mistral",  # to its tokenizer's version 7
        layout="array",
        opening="[TOOL_CALLS]",
        closing="",
        arguments_key="arguments",
        marks=("[TOOL_CALLS]",),
        unless=("[ARGS]", "[CALL_ID]"),
        short_ids=True,
    ),
    ToolFormat(
        name="llama3",  # Llama 3.1 to 3.3
        layout="alone",
        opening="<|python_tag|>",  # written by some, for calls of functions too
        closing="",
        arguments_key="parameters",
        marks=('{"name": function name, "parameters":',),
    ),
)


def tool_format_of(source: str) -> ToolFormat | None:
    """Return how the models of a chat template write calls; None where it does not say."""
    for known in TOOL_FORMATS:
        if all(mark in source for mark in known.marks) and not any(text in source for text in known.unless):
            return known
    return None


def mentions_tools(environment: ImmutableSandboxedEnvironment, source: str) -> bool:
    """Tell whether a chat template uses the variable ``tools``."""
    return any(name.name == "tools" for name in environment.parse(source).find_all(nodes.Name))


def template_message(message: Message, *, short_ids: bool = False) -> dict[str, Any]:
    """Return a turn as chat templates expect it: as OpenAI's, but with arguments as an object.

    Raises:
        InputError: a call's arguments are no JSON object.
    """
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": _short(call.id) if short_ids else call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _object(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = _short(message.tool_call_id) if short_ids else message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def use_tools(messages: Sequence[Message]) -> bool:
    """Tell whether a conversation has calls or their results."""
    return any(message.tool_calls or message.role == "tool" for message in messages)


def _short(id: str) -> str:
    if SHORT_ID.fullmatch(id):
        return id
    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:SHORT_ID_LETTERS]


def _object(arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"The arguments of a tool call must be a JSON object, not {arguments[:100]!r}.")
    return value
