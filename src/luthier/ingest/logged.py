"""Read the production log: a stored completion as the example that its answer is to its request."""

from __future__ import annotations

from typing import Any

from luthier.ingest.chat_rows import read_chat_row
from luthier.records.dataset import BadRow
from luthier.records.example import Example
from luthier.records.stored_completion import StoredCompletion

ENDED = ("stop", "tool_calls")


def logged_example(stored: StoredCompletion, number: int) -> Example | BadRow:
    """Return a conversation that ends with the first answer, the only turn with a weight; labels become fields.

    Args:
        stored: The stored completion.
        number: Its place in the log, from 1, which stands for a line.
    """
    choice: dict[str, Any] = stored.completion["choices"][0]
    answer = choice["message"]
    earlier = [turn | {"weight": 0} if turn.get("role") == "assistant" else turn for turn in stored.request["messages"]]
    try:
        if choice["finish_reason"] not in ENDED:
            raise ValueError(f"the answer did not come to its end: its finish_reason is {choice['finish_reason']!r}")
        calls = {"tool_calls": answer["tool_calls"]} if answer.get("tool_calls") else {}
        last = {"role": "assistant", "content": answer["content"], **calls}
        chat = read_chat_row({"messages": [*earlier, last], "tools": stored.request.get("tools") or []})
    except ValueError as error:
        return BadRow(line=number, reason=f"{stored.id}: {error}")
    fields = dict(stored.metadata or {})
    return Example(id=stored.id, fields=fields, messages=chat.messages, tools=chat.tools, line=number)
