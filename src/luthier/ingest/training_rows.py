"""Read a training file as OpenAI's fine-tuning takes them: a conversation, a pair of answers or a completion a line.

In: the path of a UTF-8 file. Out: for each line an :class:`~luthier.records.example.Example` of messages, or a
:class:`~luthier.records.dataset.BadRow` with every rule that it breaks. Beside what
:mod:`luthier.ingest.chat_rows` knows, a row may be ``{"prompt": "…", "completion": "…"}``, which becomes a question and
its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.ingest.chat_rows import ChatRow, is_chat_row, read_chat_row
from luthier.ingest.readers import read_rows
from luthier.records.dataset import BadRow, SourceFormat
from luthier.records.example import Example, Message


def read_training_rows(path: Path, *, pairs: bool | None = None) -> Iterator[Example | BadRow]:
    """Yield each row of a training file; with ``pairs`` each must hold two answers to one prompt, else none may.

    None takes either, but all must be of the first row's kind.
    """
    for row in read_rows(path, SourceFormat(kind="jsonl")):
        if isinstance(row, BadRow):
            yield row
            continue
        line = row.line or 0
        try:
            chat = _chat_row(row.fields)
            pairs = chat.rejected is not None if pairs is None else pairs
            if (chat.rejected is not None) != pairs:
                raise ValueError(_WRONG_METHOD[pairs])
        except ValueError as error:
            yield BadRow(line=line, reason=str(error))
        else:
            yield Example(id=row.id, **chat._asdict(), line=line)


_WRONG_METHOD = {
    True: "has no pair of answers (input, preferred_output and non_preferred_output), which method dpo learns from",
    False: "is a pair of answers, which method supervised does not learn from; method dpo does",
}


def _chat_row(row: dict[str, Any]) -> ChatRow:
    if is_chat_row(row):
        return read_chat_row(row)
    if "prompt" not in row and "completion" not in row:
        raise ValueError("has no messages (and no prompt with a completion)")
    problems = [
        f"{name} must be a text that is not empty" for name in ("prompt", "completion") if not _is_text(row, name)
    ]
    if problems:
        raise ValueError("; ".join(problems))
    turns = (Message(role="user", content=row["prompt"]), Message(role="assistant", content=row["completion"]))
    return ChatRow({name: value for name, value in row.items() if name not in ("prompt", "completion")}, turns)


def _is_text(row: dict[str, Any], name: str) -> bool:
    return isinstance(row.get(name), str) and bool(row[name].strip())
