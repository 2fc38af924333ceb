"""An engine's tokens → an answer's text, piece by piece: whole characters only, and no further than a stop string."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from luthier.llm.engine_interface import Engine
from luthier.records.completion import FinishReason, Sampling
from luthier.templates.chat_format import ChatFormat

UNFINISHED_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class AnswerDelta:
    """What is new of an answer. Text can lag behind the tokens; the last delta has the rest and the finish reason.

    ``unlisted_tokens`` were made by an engine that counts tokens but does not tell them.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    unlisted_tokens: int = 0

    @property
    def token_count(self) -> int:
        """How many tokens are new, told or not."""
        return len(self.tokens) + self.unlisted_tokens


class AnswerText:
    """Decodes an answer incrementally.

    Tokens are decoded in a window that reaches back to the last token known to end a character, because the text of
    a token depends on its neighbours (bytes of one character, spaces at the start). Text that may be the beginning
    of a stop string is held back until it is clear.
    """

    def __init__(self, chat_format: ChatFormat, stop: Sequence[str] = ()) -> None:
        self._format = chat_format
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._window = 0
        self._read = 0
        self._held = ""
        self._emitted = ""
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Take new tokens and return the text that is now certain. Sets ``stopped`` once a stop string is complete."""
        self._tokens += tokens
        before = self._format.decode(self._tokens[self._window : self._read])
        now = self._format.decode(self._tokens[self._window :])
        if len(now) > len(before) and not now.endswith(UNFINISHED_CHARACTER):
            self._held += now[len(before) :]
            self._window, self._read = self._read, len(self._tokens)
        return self._release(final=False)

    def add_text(self, text: str) -> str:
        """Take new text of an engine that tells no tokens, and return what is now certain."""
        self._held += text
        return self._release(final=False)

    def finish(self) -> str:
        """Return the rest of the text after the last token, without a character that was cut in half."""
        if self._tokens and not self.stopped:
            whole = self._format.decode(self._tokens).rstrip(UNFINISHED_CHARACTER)
            self._held = whole[len(self._emitted) :]
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released = self._held[: min(found)]
        else:
            released = self._held if final else self._held[: len(self._held) - _possible_stop(self._held, self._stop)]
        self._held = self._held[len(released) :]
        self._emitted += released
        return released


async def stream_answer(
    engine: Engine, chat_format: ChatFormat, prompt_tokens: Sequence[int], sampling: Sampling
) -> AsyncGenerator[AnswerDelta, None]:
    """Yield an answer as text and tokens; the last delta has the finish reason.

    An answer that reaches a stop string ends there with "stop", and is cancelled in the engine.

    Raises:
        EngineError: the engine refused the prompt, or it died.
        CapacityError: the engine has no room for a further request now.
    """
    text = AnswerText(chat_format, sampling.stop)
    async with aclosing(engine.generate(prompt_tokens, sampling, sorted(chat_format.stop_tokens))) as deltas:
        async for delta in deltas:
            new = text.add(delta.tokens) if delta.text is None else text.add_text(delta.text)
            reason = delta.finish_reason
            if reason is not None:
                new += text.finish()
            if text.stopped:
                reason = "stop"
            yield AnswerDelta(new, delta.tokens, delta.logprobs, reason, delta.unlisted_tokens)
            if reason is not None:
                return


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of a stop string."""
    return max((_overlap(text, stop) for stop in stops), default=0)


def _overlap(text: str, stop: str) -> int:
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
