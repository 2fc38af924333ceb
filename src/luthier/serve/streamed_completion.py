"""A streamed answer put together: ``chat.completion.chunk`` dicts come in, the ``chat.completion`` goes out."""

from __future__ import annotations

from typing import Any

Dict = dict[str, Any]


class StreamedCompletion:
    """The chunks of one answer as far as they have come."""

    def __init__(self) -> None:
        self._first: Dict = {}
        self._choices: dict[int, Dict] = {}
        self._usage: Dict | None = None

    def add(self, chunk: Dict) -> None:
        """Take a chunk."""
        self._first = self._first or chunk
        self._usage = chunk.get("usage") or self._usage
        for part in chunk["choices"]:
            _extend(self._choices.setdefault(part["index"], _choice(part["index"])), part)

    @property
    def completion(self) -> Dict:
        """The answer, as it would have come without a stream."""
        envelope = {name: value for name, value in self._first.items() if name not in ("choices", "usage")}
        choices = [self._choices[index] for index in sorted(self._choices)]
        usage = {"usage": self._usage} if self._usage else {}
        return envelope | {"object": "chat.completion", "choices": choices} | usage


def _choice(index: int) -> Dict:
    message: Dict = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None}


def _extend(choice: Dict, part: Dict) -> None:
    delta, message = part.get("delta") or {}, choice["message"]
    for name in ("content", "refusal"):
        if delta.get(name) is not None:
            message[name] = (message[name] or "") + delta[name]
    for call in delta.get("tool_calls") or ():
        _extend_call(message.setdefault("tool_calls", []), call)
    if message.get("tool_calls"):
        message["content"] = message["content"] or None
    if logprobs := part.get("logprobs"):
        kept = choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
        kept["content"] += logprobs.get("content") or []
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]


def _extend_call(calls: list[Dict], part: Dict) -> None:
    while len(calls) <= part["index"]:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[part["index"]]
    function = part.get("function") or {}
    call["id"] = part.get("id") or call["id"]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""
