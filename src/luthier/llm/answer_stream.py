"""An engine's tokens → an answer's text, piece by piece: whole characters only, and no further than a stop string."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from luthier.llm.engine_interface import Engine
from luthier.records.completion import FinishReason, Sampling
from luthier.templates.chat_format import ChatFormat

UNFINISHED_CHARACTER = "\ufffd"
new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class AnswerDelta(NamedTuple):
    """What is new of an answer. Text can lag behind the tokens; the last delta has the rest and the finish reason.

    ``unlisted_tokens`` were made by an engine that counts tokens but does not tell them.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    unlisted_tokens: int = 0
    alternatives: tuple[dict[int, float], ...] = ()

    @property
    def token_count(self) -> int:
        """How many tokens are new, told or not."""
        return len(self.tokens) + self.unlisted_tokens


class AnswerText:
    """Decodes an answer incrementally. Text that may be the beginning of a stop string is held back until it is clear.

    Args:
        chat_format: Whose tokens.
        stop: Strings before which the answer ends.
        with_special: Whether special tokens have text. A stop token has it where further tokens follow.
    """

    def __init__(self, chat_format: ChatFormat, stop: Sequence[str] = (), *, with_special: bool = False) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._decoder: _Bytes | _Window = (
            _Window(chat_format, with_special)
            if chat_format.token_bytes is None
            else _Bytes(chat_format, chat_format.token_bytes, with_special)
        )
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Take new tokens and return the text that is now certain. Sets ``stopped`` once a stop string is complete."""
        new = self._decoder.add(tokens)
        return self._release(new, final=False) if self._stop else new

    def add_text(self, text: str) -> str:
        """Take new text of an engine that tells no tokens, and return what is now certain."""
        return self._release(text, final=False)

    def finish(self) -> str:
        """Return the rest of the text after the last token, without a character that was cut in half."""
        return self._release("" if self.stopped else self._decoder.finish(), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released = self._held[: min(found)]
        else:
            released = self._held if final else self._held[: len(self._held) - possible_stop(self._held, self._stop)]
        self._held = self._held[len(released) :]
        return released


class _Bytes:
    """Decodes tokens that stand for bytes, whatever their neighbours are."""

    def __init__(self, chat_format: ChatFormat, token_bytes: dict[int, bytes], with_special: bool) -> None:
        self._stops = chat_format.stop_tokens
        self._left_out = frozenset() if with_special else chat_format.special_ids
        self._with_special = with_special
        self._bytes = token_bytes
        self._decode = new_utf8_decoder("replace").decode
        self._ended = False
        self._waiting = b""  # a stop token's text
        self._held = ""

    def add(self, tokens: Sequence[int]) -> str:
        if len(tokens) == 1 and not self._ended and not self._waiting:  # what almost always comes
            (token,) = tokens
            if token not in self._stops:
                return "" if token in self._left_out else self._certain(self._decode(self._bytes[token]))
        return self._certain(self._decode(b"".join(map(self._bytes_of, tokens))))

    def _certain(self, text: str) -> str:
        """Hold back bytes that are no characters at the end: an answer does not end in them."""
        text = self._held + text
        kept = text.rstrip(UNFINISHED_CHARACTER)
        self._held = text[len(kept) :]
        return kept

    def _bytes_of(self, token: int) -> bytes:
        if self._ended:
            return b""
        before, self._waiting = self._waiting, b""
        if token in self._stops:
            self._ended = not self._with_special
            self._waiting = self._bytes[token] if self._with_special else b""
            return before
        return before if token in self._left_out else before + self._bytes[token]

    def finish(self) -> str:
        return ""


class _Window:
    """Decodes tokens in a window that reaches back to the last token known to end a character.

    The text of a token depends on its neighbours here (bytes of one character, spaces at the start).
    """

    def __init__(self, chat_format: ChatFormat, with_special: bool) -> None:
        self._format = chat_format
        self._with_special = with_special
        self._tokens: list[int] = []
        self._start = 0
        self._read = 0
        self._said = ""

    def add(self, tokens: Sequence[int]) -> str:
        self._tokens += tokens
        before = self._text(self._tokens[self._start : self._read])
        now = self._text(self._tokens[self._start :])
        if len(now) <= len(before) or now.endswith(UNFINISHED_CHARACTER):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        self._said += now[len(before) :]
        return now[len(before) :]

    def finish(self) -> str:
        whole = self._text(self._tokens).rstrip(UNFINISHED_CHARACTER)
        return whole[len(self._said) :]

    def _text(self, tokens: Sequence[int]) -> str:
        if not self._with_special:
            return self._format.decode(tokens)
        ends = bool(tokens) and tokens[-1] in self._format.stop_tokens
        return str(self._format.tokenizer.decode(list(tokens[:-1] if ends else tokens), skip_special_tokens=False))


async def stream_answer(
    engine: Engine,
    chat_format: ChatFormat,
    prompt_tokens: Sequence[int],
    sampling: Sampling,
    *,
    with_special: bool = False,
) -> AsyncGenerator[AnswerDelta, None]:
    """Yield an answer as text and tokens; the last delta has the finish reason.

    An answer that reaches a stop string ends there with "stop", and is cancelled in the engine. Special tokens have
    text ``with_special``, and where the answer is constrained: there they are what the grammar takes them for.

    Raises:
        EngineError: the engine refused the prompt, or it died.
        BusyError: the engine has no room for a further request now.
        InputError: the engine cannot answer such a request.
    """
    text = AnswerText(chat_format, sampling.stop, with_special=with_special or sampling.constraint is not None)
    async with aclosing(engine.generate(prompt_tokens, sampling, sorted(chat_format.stop_tokens))) as deltas:
        async for delta in deltas:
            new = text.add(delta.tokens) if delta.text is None else text.add_text(delta.text)
            reason = delta.finish_reason
            if reason is not None:
                new += text.finish()
            if text.stopped:
                reason = "stop"
            yield AnswerDelta(
                new, delta.tokens, delta.logprobs, reason, delta.unlisted_tokens, alternatives=delta.alternatives
            )
            if reason is not None:
                return


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of a stop string."""
    return max((_overlap(text, stop) for stop in stops), default=0)


def _overlap(text: str, stop: str) -> int:
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
