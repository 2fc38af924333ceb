"""Examples: what a model learns from, as named fields or as a finished conversation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from luthier.records.record import Record, content_hash

Role = Literal["system", "user", "assistant"]
SplitName = Literal["train", "validation", "test"]


class Message(Record):
    """One turn of a conversation.

    ``weight`` is OpenAI's: 0 keeps an assistant turn out of the loss, 1 trains on it.
    """

    role: Role
    content: str
    weight: Literal[0, 1] = 1


class Example(Record):
    """One example: either ``fields`` (rendered through a template) or ``messages`` (already a conversation).

    ``line`` is where it stood in its source file, counted from 1. ``split`` is None until the dataset is split.
    """

    id: str
    fields: dict[str, Any] = Field(default_factory=dict)
    messages: tuple[Message, ...] | None = None
    split: SplitName | None = None
    line: int | None = None

    def content_key(self) -> str:
        """Return a hash of the content alone (not id, line or split): equal for exact duplicates."""
        messages = [message.model_dump() for message in self.messages] if self.messages else None
        return content_hash([self.fields, messages])


class Conversation(Record):
    """An example as messages; the last one is the assistant's answer to learn, or to be compared with."""

    example_id: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the final answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the final assistant message."""
        return self.messages[-1].content
