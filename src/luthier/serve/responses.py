"""OpenAI's responses on a loaded model, independent of HTTP: a chat's chunks come in, events and a response go out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import LuthierError
from luthier.records.response import Item
from luthier.records.stored import new_id, now
from luthier.serve.api_error import as_api_error
from luthier.serve.chat import Chat, prepare_chat, stream_chat
from luthier.serve.pool import LoadedModel
from luthier.serve.response_request import ResponseRequest, TextOptions, renamed

Dict = dict[str, Any]
Keep = Callable[[Dict], Awaitable[None]]
TOO_MANY_REQUESTS = 429
FINAL = ("response.completed", "response.incomplete")


@dataclass(frozen=True)
class ResponseRun:
    """A request that is ready to run. ``items`` are all that the model is given beside the instructions."""

    request: ResponseRequest
    items: Sequence[Item]
    chat: Chat
    id: str = field(default_factory=lambda: new_id("resp_"))
    created_at: int = field(default_factory=now)

    def shown(self, status: str, output: Sequence[Item] = (), **changes: Any) -> Dict:
        """Return the response as it is now."""
        request = self.request
        text = (request.text or TextOptions()).model_dump(by_alias=True, exclude_unset=True)
        shown: Dict = {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": list(output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": request.is_stored,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": text | {"format": text.get("format") or {"type": "text"}},
            "tool_choice": _tool_choice(request),
            "tools": [
                {"parameters": None, "strict": None} | tool.model_dump(exclude_unset=True)
                for tool in request.tools or ()
            ],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }
        return shown | changes


def prepare_response(request: ResponseRequest, items: Sequence[Item], loaded: LoadedModel) -> ResponseRun:
    """Render the conversation of a request and settle its sampling.

    Args:
        request: The request.
        items: The items of the conversation that it goes on from, and its own.
        loaded: The model.

    Raises:
        ApiError: 400, where the conversation leaves no room for an answer, or an option cannot be honoured.
    """
    asked = request.chat(items)
    with renamed():
        return ResponseRun(request, items, prepare_chat(asked, loaded))


async def prepared_response(request: ResponseRequest, items: Sequence[Item], loaded: LoadedModel) -> ResponseRun:
    """Prepare a response as :func:`prepare_response` does, in a thread, so that nobody else waits for it.

    Raises:
        ApiError: as :func:`prepare_response`.
    """
    return await asyncio.to_thread(prepare_response, request, items, loaded)


async def complete_response(run: ResponseRun) -> Dict:
    """Return a ``response``.

    Raises:
        EngineError: the engine died.
    """
    last: Dict = {}
    async with aclosing(_Answer(run).events()) as events:
        async for event in events:
            last = event
    response: Dict = last["response"]
    return response


async def stream_response(run: ResponseRun, keep: Keep | None = None) -> AsyncGenerator[Dict, None]:
    """Yield the events of a response; a failure in the middle is its last event.

    ``keep`` is given the finished response before it is told.
    """
    answer = _Answer(run)
    try:
        async with aclosing(answer.events()) as events:
            async for event in events:
                if keep is not None and event["type"] in FINAL:
                    await keep(event["response"])
                yield event
    except LuthierError as error:
        yield answer.failed(error)


class _Answer:
    """A response as far as it has come."""

    def __init__(self, run: ResponseRun) -> None:
        self._run = run
        self._sequence_number = 0
        self._output: list[Dict] = []
        self._open: Dict | None = None
        self._text: list[str] = []
        self._logprobs: list[Dict] = []
        self._usage: Dict | None = None
        self._finish_reason: str | None = None

    async def events(self) -> AsyncGenerator[Dict, None]:
        """Yield all events; the last one has the finished response.

        Raises:
            EngineError: the engine died.
        """
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._run.shown("in_progress"))
        async with aclosing(stream_chat(self._run.chat)) as chunks:
            async for chunk in chunks:
                self._usage = chunk.get("usage") or self._usage
                for choice in chunk["choices"]:
                    for event in self._take(choice):
                        yield event
        for event in self._finish():
            yield event

    def failed(self, error: LuthierError) -> Dict:
        """Return the event of a failure."""
        found = as_api_error(error)
        code = "rate_limit_exceeded" if found.status == TOO_MANY_REQUESTS else "server_error"
        told = {"code": code, "message": found.message}
        return self._event("response.failed", response=self._run.shown("failed", self._output, error=told))

    def _take(self, choice: Dict) -> Iterator[Dict]:
        self._finish_reason = choice["finish_reason"] or self._finish_reason
        delta = choice["delta"]
        entries = (choice.get("logprobs") or {}).get("content") or []
        if delta.get("content") or entries:
            yield from self._say(delta.get("content") or "", entries)
        for call in delta.get("tool_calls") or ():
            yield from self._call(call)

    def _say(self, text: str, entries: list[Dict]) -> Iterator[Dict]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close("completed")
            yield from self._open_message()
        self._text.append(text)
        self._logprobs += entries
        yield self._about_part("response.output_text.delta", delta=text, logprobs=[_short(one) for one in entries])

    def _call(self, call: Dict) -> Iterator[Dict]:
        function = call.get("function") or {}
        if call.get("id"):
            yield from self._close("completed")
            told = {"call_id": call["id"], "name": function["name"], "arguments": ""}
            yield from self._begin({"id": new_id("fc_"), "type": "function_call", "status": "in_progress", **told})
        assert self._open is not None  # noqa: S101 - a call begins with its id
        if arguments := function.get("arguments"):
            self._open["arguments"] += arguments
            yield self._about_item("response.function_call_arguments.delta", delta=arguments)

    def _finish(self) -> Iterator[Dict]:
        cut = self._finish_reason == "length"
        if not self._output:
            yield from self._open_message()
        yield from self._close("incomplete" if cut else "completed")
        status = "incomplete" if cut else "completed"
        details = {"reason": "max_output_tokens"} if cut else None
        response = self._run.shown(status, self._output, incomplete_details=details, usage=_usage(self._usage))
        yield self._event(f"response.{status}", response=response)

    # Items

    def _open_message(self) -> Iterator[Dict]:
        self._text, self._logprobs = [], []
        told = {"status": "in_progress", "role": "assistant", "content": []}
        yield from self._begin({"id": new_id("msg_"), "type": "message", **told})
        yield self._about_part("response.content_part.added", part=_part("", []))

    def _begin(self, item: Dict) -> Iterator[Dict]:
        self._open = item
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))

    def _close(self, status: str) -> Iterator[Dict]:
        """End the item that is open, if there is one."""
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "message":
            text = "".join(self._text)
            part = _part(text, [_whole(one) for one in self._logprobs])
            item["content"] = [part]
            logprobs = [_short(one) for one in self._logprobs]
            yield self._about_part("response.output_text.done", text=text, logprobs=logprobs)
            yield self._about_part("response.content_part.done", part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._about_item("response.function_call_arguments.done", **told)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=dict(item))
        self._open = None

    # Events

    def _about_part(self, kind: str, **fields: Any) -> Dict:
        return self._about_item(kind, content_index=0, **fields)

    def _about_item(self, kind: str, **fields: Any) -> Dict:
        assert self._open is not None  # noqa: S101 - told of an item that is open
        return self._event(kind, item_id=self._open["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Dict:
        event = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return event


def _part(text: str, logprobs: list[Dict]) -> Dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _whole(entry: Dict) -> Dict:
    """Return a token's logprob with its bytes, which are none where they are not known."""
    others = [_whole(other) for other in entry.get("top_logprobs") or ()]
    told = {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"] or []}
    return told | ({"top_logprobs": others} if "top_logprobs" in entry else {})


def _short(entry: Dict) -> Dict:
    others = [{"token": other["token"], "logprob": other["logprob"]} for other in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": others}


def _usage(usage: Dict | None) -> Dict | None:
    """Return a chat's usage as responses write it; nothing is reasoned, and what the cache gave is not counted."""
    if usage is None:
        return None
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _tool_choice(request: ResponseRequest) -> Any:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return choice.model_dump(exclude_unset=True)
