"""An answer's text → what it says and which functions it calls, piece by piece as it comes.

What looks like a call and is none (of an unknown function, or no JSON) stays text, so nothing of an answer is lost.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from luthier.llm.answer_stream import possible_stop
from luthier.templates.tool_formats import SHORT_ID_LETTERS, ToolFormat

ID_LETTERS = string.ascii_letters + string.digits
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)


class CallPiece(NamedTuple):
    """What is new of the call of that ``number``; its first piece has the ``id`` and the ``name``."""

    number: int
    arguments: str
    id: str | None = None
    name: str | None = None


Piece = str | CallPiece


class ToolReader:
    """Reads one answer.

    Args:
        tool_format: How the model writes calls.
        names: The functions that it may call.
        several: Whether it may call more than one; otherwise the answer is ``done`` behind the first call.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str], *, several: bool) -> None:
        self._format = tool_format
        self._names = names
        self._several = several
        self._state: Literal["text", "head", "arguments", "tail", "closing"] = "text"
        self._text = ""  # what has come and is not read yet
        self._raw = ""  # what led to the head of a call, in case that it is none
        self._white = ""  # white space that is only said if text follows
        self._is_plain = False
        self._value = _Value()
        self.calls = 0
        self.done = False

    def add(self, text: str) -> list[Piece]:
        """Take new text, and return what is certain now."""
        pieces: list[Piece] = []
        self._text += text
        while not self.done and self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back, at the end of the answer."""
        pieces: list[Piece] = []
        if not self.done and self._state in ("text", "head"):
            self._say(self._raw + self._text, pieces)
        if not self.calls and self._white:
            pieces.append(self._white)
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Read on, and return whether that may lead further."""
        if self._state == "text":
            return self._alone() if self._format.layout == "alone" and not self._is_plain else self._read_text(pieces)
        if self._state == "head":
            return self._read_head(pieces)
        if self._state == "arguments":
            return self._read_arguments(pieces)
        return self._read_tail() if self._state == "tail" else self._read_closing()

    # Text

    def _read_text(self, pieces: list[Piece]) -> bool:
        opening = self._format.opening
        place = -1 if self._is_plain else self._text.find(opening)
        if place < 0:
            held = 0 if self._is_plain else possible_stop(self._text, (opening,))
            said, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
            self._say(said, pieces)
            return False
        self._say(self._text[:place], pieces)
        self._raw, self._text = opening, self._text[place + len(opening) :]
        self._state = "head"
        return True

    def _alone(self) -> bool:
        """Tell by its beginning whether an answer is a call or text."""
        begun = self._text.lstrip()
        opening = self._format.opening
        if not begun or (len(begun) < len(opening) and opening.startswith(begun)):
            return False
        rest = begun.removeprefix(opening)
        self._raw, self._text = self._text[: len(self._text) - len(rest)], rest
        self._is_plain = True  # whatever follows the call
        self._state = "head" if rest.lstrip()[:1] in ("", "{") else "text"
        if self._state == "text":
            self._raw, self._text = "", self._raw + self._text
        return True

    def _say(self, text: str, pieces: list[Piece]) -> None:
        said = (self._white + text).rstrip()
        self._white = (self._white + text)[len(said) :]
        if said:
            pieces.append(said)

    # Calls

    def _read_head(self, pieces: list[Piece]) -> bool:
        rest = self._text.lstrip().removeprefix("[") if self._format.layout == "array" else self._text
        found = HEAD.match(rest)
        if found is not None and (name := json_text(found[1])) in self._names:
            self._begin(str(name), "", pieces)
            self._text, self._value, self._state = rest[found.end() :], _Value(), "arguments"
            return True
        whole = _Value()
        end = whole.end(rest)
        if end is None and rest.lstrip()[:1] in ("", "{"):
            return False
        call = json_text(rest[:end]) if end is not None and found is None else None
        arguments = _arguments(call)
        if isinstance(call, dict) and arguments is not None and call.get("name") in self._names:
            self._begin(str(call["name"]), arguments, pieces)
            self._text = rest[end:]
            return self._end()
        self._say(self._raw + self._text[:1], pieces)
        self._raw, self._text, self._state = "", self._text[1:], "text"
        return bool(self._text)

    def _begin(self, name: str, arguments: str, pieces: list[Piece]) -> None:
        self._raw = ""
        pieces.append(CallPiece(self.calls, arguments, _new_id(self._format), name))
        self.calls += 1

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        end = self._value.end(self._text)
        piece = self._text[:end]
        if piece:
            pieces.append(CallPiece(self.calls - 1, piece))
        self._text = self._text[len(piece) :]
        if end is not None:
            self._value, self._state = _Value(depth=1), "tail"
        return end is not None

    def _read_tail(self) -> bool:
        end = self._value.end(self._text)
        self._text = "" if end is None else self._text[end:]
        return end is not None and self._end()

    def _end(self) -> bool:
        """Go on behind the object of a call."""
        self.done = not self._several
        self._state = "closing"
        return True

    def _read_closing(self) -> bool:
        """Leave out what closes a call, or the array of calls, or separates two of these."""
        rest = self._text.lstrip()
        closings = ("]", ",") if self._format.layout == "array" else (self._format.closing,)
        if not rest or any(len(rest) < len(closing) and closing.startswith(rest) for closing in closings):
            return False
        closing = next((closing for closing in closings if rest.startswith(closing)), "")
        self._text = rest.removeprefix(closing)
        self._state = "head" if closing == "," else "text"
        return True


class _Value:
    """Finds where a JSON array or object ends, in text that comes piece by piece."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._is_escaped = False

    def end(self, text: str) -> int | None:
        """Return the place behind its end in ``text``; None: it has not ended there."""
        for place, letter in enumerate(text, 1):
            if self._in_string:
                self._in_string = self._is_escaped or letter != '"'
                self._is_escaped = letter == "\\" and not self._is_escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place
        return None


def json_text(text: str) -> Any:
    """Return what JSON text says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _arguments(call: Any) -> str | None:
    """Return the arguments of a call's object as JSON text, wherever they stand in it."""
    if not isinstance(call, dict):
        return None
    given = call.get("arguments", call.get("parameters", {}))
    value = json_text(given) if isinstance(given, str) else given
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _new_id(tool_format: ToolFormat) -> str:
    letters = SHORT_ID_LETTERS if tool_format.short_ids else 24
    made = "".join(secrets.choice(ID_LETTERS) for _ in range(letters))
    return made if tool_format.short_ids else f"call_{made}"
