"""Keeps an answer in the production log while it is given: whole ones as they are, streams put together again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request

from luthier.api.middleware import REQUEST_ID
from luthier.api.service import service_of
from luthier.records.access import Caller
from luthier.serve.chat_request import ChatRequest
from luthier.serve.sampling_options import StreamOptions
from luthier.serve.streamed_completion import StreamedCompletion
from luthier.workflows.completions import keep_completion

Dict = dict[str, Any]


class ChatLog:
    """The place in the log of one request's answer."""

    def __init__(self, request: Request, caller: Caller, body: ChatRequest) -> None:
        self._store = service_of(request).store
        self._project = caller.project
        self._request_id: str | None = request.scope.get(REQUEST_ID)
        self._asked = body.model_dump(mode="json", exclude_unset=True)
        self._shows_usage = body.include_usage

    async def keep(self, completion: Dict) -> None:
        """Keep an answer; once this returns, it is there after any kill."""
        await asyncio.to_thread(
            keep_completion, self._store, self._project, self._asked, completion, request_id=self._request_id
        )

    async def keeping(self, chunks: AsyncGenerator[Dict, None]) -> AsyncGenerator[Dict, None]:
        """Pass a stream on, and keep it before it ends; one that its client leaves is not kept.

        The stream must count its tokens (:func:`counted`); whoever did not ask for that does not see it.
        """
        streamed = StreamedCompletion()
        async with aclosing(chunks):
            async for chunk in chunks:
                streamed.add(chunk)
                if self._shows_usage:
                    yield chunk
                elif chunk["choices"]:
                    yield {name: value for name, value in chunk.items() if name != "usage"}
        await self.keep(streamed.completion)


def counted(body: ChatRequest) -> ChatRequest:
    """Return a request whose stream ends with a chunk that counts the tokens."""
    return body.model_copy(update={"stream_options": StreamOptions(include_usage=True)})
