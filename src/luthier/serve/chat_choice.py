"""One answer of a chat completion: an engine's deltas come in, OpenAI's parts of a choice go out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from luthier.errors import EngineError
from luthier.llm.answer_stream import AnswerDelta
from luthier.llm.tool_reader import CallPiece, Piece
from luthier.serve.api_error import ApiError
from luthier.serve.chat_request import ChatRequest
from luthier.serve.chat_tools import ToolUse
from luthier.templates.chat_format import ChatFormat

Part = dict[str, Any]
"""A choice of a ``chat.completion.chunk``."""


class ChatChoice:
    """An answer as far as it has come."""

    def __init__(self, chat_format: ChatFormat, request: ChatRequest, tools: ToolUse | None, index: int) -> None:
        self._format = chat_format
        self._request = request
        self._index = index
        self._reader = tools.reader() if tools else None
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._tokens: list[int] = []
        self._logprobs: list[dict[str, Any]] | None = [] if request.logprobs else None
        asked = request.response_format
        self._is_json = asked is not None and asked.type != "text" and not request.stops
        self.token_count = 0
        self.finish_reason: str | None = None

    def add(self, delta: AnswerDelta) -> Iterator[Part]:
        """Take what is new, and yield it as parts.

        Raises:
            EngineError: the answer is over, and is not the JSON that it had to be.
            ApiError: 400, where logprobs are asked for, and the engine does not tell its tokens.
        """
        self.token_count += delta.token_count
        self._tokens += delta.tokens
        logprobs = self._new_logprobs(delta)
        reason = delta.finish_reason
        pieces: list[Piece] = [delta.text] if self._reader is None else self._reader.add(delta.text)
        if self._reader is not None:
            if reason is not None:
                pieces += self._reader.finish()
            if self._reader.done or (reason == "stop" and self._reader.calls):
                self.finish_reason = "tool_calls"
        self.finish_reason = self.finish_reason or reason
        for piece in pieces:
            if piece:
                yield self._part(self._said(piece), logprobs)
                logprobs = None
        if logprobs and logprobs["content"]:
            yield self._part({"content": ""}, logprobs)
        if self.finish_reason is not None:
            self._check()
            yield self._part({}, finish_reason=self.finish_reason)

    @property
    def completed(self) -> dict[str, Any]:
        """The answer as a choice of a ``chat.completion``."""
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        if self._calls:
            message |= {"content": text or None, "tool_calls": self._calls}
        token_ids = {"token_ids": self._tokens} if self._request.return_token_ids else {}
        return {
            **token_ids,
            "index": self._index,
            "message": message,
            "logprobs": None if self._logprobs is None else {"content": self._logprobs, "refusal": None},
            "finish_reason": self.finish_reason,
        }

    def _part(self, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> Part:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _said(self, piece: Piece) -> dict[str, Any]:
        if not isinstance(piece, CallPiece):
            self._texts.append(piece)
            return {"content": piece}
        if piece.id is None:
            self._calls[piece.number]["function"]["arguments"] += piece.arguments
            return {"tool_calls": [{"index": piece.number, "function": {"arguments": piece.arguments}}]}
        function = {"name": piece.name, "arguments": piece.arguments}
        call = {"id": piece.id, "type": "function"}
        self._calls.append(call | {"function": dict(function)})
        return {"tool_calls": [{"index": piece.number, **call, "function": function}]}

    def _check(self) -> None:
        """See that an answer which had to be JSON is; an engine elsewhere may not know what it was bound to."""
        if not self._is_json or self._calls or self.finish_reason != "stop":
            return
        try:
            json.loads("".join(self._texts))
        except (ValueError, RecursionError) as error:
            raise EngineError("The engine did not keep to the response format: the answer is no JSON.") from error

    # Logprobs

    def _new_logprobs(self, delta: AnswerDelta) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        if delta.unlisted_tokens:
            raise ApiError(400, "logprobs: the engine of this model does not tell its tokens.", param="logprobs")
        entries = []
        for place, (token, logprob) in enumerate(zip(delta.tokens, delta.logprobs, strict=True)):
            if token not in self._format.stop_tokens:
                others = delta.alternatives[place] if delta.alternatives else {}
                entries.append(self._entry(token, logprob) | {"top_logprobs": self._top(others)})
        self._logprobs += entries
        return {"content": entries, "refusal": None}

    def _top(self, alternatives: dict[int, float]) -> list[dict[str, Any]]:
        likeliest = sorted(alternatives.items(), key=lambda item: -item[1])[: self._request.top_logprobs or 0]
        return [self._entry(token, logprob) for token, logprob in likeliest]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Return one token's entry; ``bytes`` is null for a part of a character where it is not known."""
        text = self._format.tokenizer.decode([token], skip_special_tokens=False)
        known = self._format.token_bytes
        whole = known[token] if known is not None else text.encode() if "\ufffd" not in text else None
        return {"token": text, "logprob": logprob, "bytes": None if whole is None else list(whole)}
