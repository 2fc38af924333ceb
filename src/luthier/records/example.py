"""Examples: what a model learns from, as named fields, as a finished conversation, or as a pair of answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from luthier.records.record import Record, content_hash

Role = Literal["system", "user", "assistant", "tool"]
SplitName = Literal["train", "validation", "test"]
Tool = dict[str, Any]
"""A tool as OpenAI writes it: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""


def _is_absent(value: object) -> bool:
    # What came after the first records is left out of their JSON text where it says nothing, so that hashes stay.
    return not value


class ToolCall(Record):
    """A call of a function that an assistant asks for; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


class Message(Record):
    """One turn of a conversation.

    ``weight`` is OpenAI's: 0 keeps an assistant turn out of the loss, 1 trains on it. An assistant's turn may ask for
    ``tool_calls``; a turn of the role "tool" is what came of one, and says which in ``tool_call_id``. ``name`` is the
    name of the function that was called.
    """

    role: Role
    content: str
    weight: Literal[0, 1] = 1
    tool_calls: tuple[ToolCall, ...] = Field((), exclude_if=_is_absent)
    tool_call_id: str | None = Field(None, exclude_if=_is_absent)
    name: str | None = Field(None, exclude_if=_is_absent)

    @property
    def whole_text(self) -> str:
        """The content, and the calls behind it, for people to read and for turns to be compared."""
        calls = (f"{call.name}({call.arguments})" for call in self.tool_calls)
        return "\n".join([*([self.content] if self.content or not self.tool_calls else []), *calls])

    @property
    def says_something(self) -> bool:
        """Whether there is anything to learn or to read: text, or a call."""
        return bool(self.content.strip()) or bool(self.tool_calls)


class Example(Record):
    """One example: either ``fields`` (rendered through a template) or ``messages`` (already a conversation).

    With ``rejected``, ``messages`` is the prompt and the preferred answer, and ``rejected`` is the worse answer to the
    same prompt. The ``fields`` of a conversation are the other keys of its row, such as a weight or a label.
    ``line`` is where it stood in its source file, counted from 1. ``split`` is None until the dataset is split.
    ``tools`` are those that the assistant of the conversation could call.
    """

    id: str
    fields: dict[str, Any] = Field(default_factory=dict)
    messages: tuple[Message, ...] | None = None
    rejected: tuple[Message, ...] | None = None
    split: SplitName | None = None
    line: int | None = None
    tools: tuple[Tool, ...] = Field((), exclude_if=_is_absent)

    def content_key(self) -> str:
        """Return a hash of the content alone (not id, line or split): equal for exact duplicates."""
        messages = [message.model_dump() for message in self.messages] if self.messages else None
        rejected = [[message.model_dump() for message in self.rejected]] if self.rejected else []
        tools = [{"tools": self.tools}] if self.tools else []
        return content_hash([self.fields, messages, *rejected, *tools])


class Conversation(Record):
    """An example as messages; the last one is the assistant's answer to learn, or to be compared with.

    ``rejected`` is the worse answer to the same prompt. ``weight`` multiplies the example's loss; ``margin`` is by how
    much the preferred answer is better; ``thumb`` says whether the answer was liked. They come from columns.
    ``tools`` are those that the assistant could call.
    """

    example_id: str
    messages: tuple[Message, ...]
    rejected: tuple[Message, ...] | None = None
    weight: float = 1.0
    margin: float = 0.0
    thumb: bool | None = None
    tools: tuple[Tool, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the final answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the final assistant message."""
        return self.messages[-1].content

    def ending_in(self, answer: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return the prompt and an answer, with a weight (and so loss) on the last message alone."""
        turns = (*self.prompt, *answer)
        silent = (turn.model_copy(update={"weight": 0}) if turn.role == "assistant" else turn for turn in turns[:-1])
        return (*silent, *(turn.model_copy(update={"weight": 1}) for turn in turns[-1:]))
