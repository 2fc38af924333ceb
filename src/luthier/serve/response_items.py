"""The items of OpenAI's Responses API, and the turns of a chat that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from luthier.records.response import Item
from luthier.records.stored import new_id

MESSAGE, OUTPUT = "message", "function_call_output"
Dict = dict[str, Any]


def _type_of(value: Any, default: str) -> str:
    kind = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    return kind if isinstance(kind, str) else "of an unknown type"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class TextPart(_Part):
    """A piece of text; only text is known."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(_Part):
    """What an assistant said when it did not answer."""

    type: Literal["refusal"]
    refusal: str


def _part_kind(value: Any) -> str:
    return f"part {_type_of(value, 'output_text')}"


# Tags are no identifiers, so that errors do not take them for names of fields.
ContentPart = Annotated[
    Annotated[TextPart, Tag("part input_text")]
    | Annotated[TextPart, Tag("part output_text")]
    | Annotated[TextPart, Tag("part text")]
    | Annotated[RefusalPart, Tag("part refusal")],
    Discriminator(_part_kind),
]


class MessageItem(_Part):
    """A turn of anybody."""

    type: Literal["message"] = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in self.content)

    def item(self) -> Item:
        """Return the turn as it is kept and shown."""
        kept: Item = {"id": self.id or new_id("msg_"), "type": MESSAGE, "role": self.role, "status": "completed"}
        if self.role != "assistant":
            return kept | {"content": [{"type": "input_text", "text": self.text}]}
        return kept | {"content": [{"type": "output_text", "text": self.text, "annotations": []}]}


class CallItem(_Part):
    """A call that a model asked for; ``arguments`` are JSON text."""

    type: Literal["function_call"]
    id: str | None = None
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str

    def item(self) -> Item:
        """Return the call as it is kept and shown."""
        told = self.model_dump(include={"type", "call_id", "name", "arguments"})
        return {"id": self.id or new_id("fc_"), "status": "completed", **told}


class OutputItem(_Part):
    """What a called function gave."""

    type: Literal["function_call_output"]
    id: str | None = None
    call_id: str = Field(min_length=1)
    output: str | list[TextPart]

    def item(self) -> Item:
        """Return the output as it is kept and shown."""
        text = self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)
        told = {"type": OUTPUT, "call_id": self.call_id, "output": text}
        return {"id": self.id or new_id("fco_"), "status": "completed", **told}


def _item_kind(value: Any) -> str:
    return f"item {_type_of(value, MESSAGE)}"


InputItem = Annotated[
    Annotated[MessageItem, Tag("item message")]
    | Annotated[CallItem, Tag("item function_call")]
    | Annotated[OutputItem, Tag("item function_call_output")],
    Discriminator(_item_kind),
]


def items_of(given: str | Sequence[MessageItem | CallItem | OutputItem]) -> list[Item]:
    """Return an input as items that can be kept and shown, each with an id."""
    if isinstance(given, str):
        return [MessageItem(role="user", content=given).item()]
    return [one.item() for one in given]


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[Dict]:
    """Return items as the messages of a chat; an assistant's text and the calls that follow it are one turn."""
    messages: list[Dict] = [{"role": "system", "content": instructions}] if instructions else []
    for item in items:
        if item["type"] == MESSAGE:
            messages.append({"role": item["role"], "content": "".join(part["text"] for part in item["content"])})
        elif item["type"] == OUTPUT:
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        else:
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages
