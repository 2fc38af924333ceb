"""How long a request may take, and how many answers an engine makes at once: whoever is over it is told, and early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from luthier.serve.api_error import ApiError

MAX_REQUESTS = 256
REQUEST_SECONDS = 600.0
RETRY_SECONDS = 1.0
Item = TypeVar("Item")


@dataclass(frozen=True)
class RequestLimits:
    """What one engine is asked for at most.

    Once so many answers are made or waited for (``requests``: each has one as a rule), a further request gets 429. One
    that takes longer than ``seconds`` ends.
    """

    requests: int = MAX_REQUESTS
    seconds: float = REQUEST_SECONDS

    def check(self, asked: int, name: str) -> None:
        """Refuse a request to a model that is asked for so many answers already.

        Raises:
            ApiError: 429, with a hint when to come again.
        """
        if asked >= self.requests:
            raise ApiError(
                429,
                f"The model {name!r} is asked for {asked} answers, as many as it takes at once. Try again soon.",
                type="requests",
                code="overloaded",
                retry_after_seconds=RETRY_SECONDS,
            )


class Deadline:
    """The moment by which a request is over. Make it where the request begins, on its event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = asyncio.get_running_loop().time() + seconds

    @property
    def error(self) -> ApiError:
        """What a request is told that was not over in time."""
        message = f"The request was not answered within {self._seconds:g} seconds, and was given up."
        return ApiError(504, message, type="server_error", code="deadline_exceeded")

    @asynccontextmanager
    async def within(self) -> AsyncIterator[None]:
        """Break off, at the deadline, whatever waits inside.

        Raises:
            ApiError: 504.
        """
        try:
            async with asyncio.timeout_at(self._at):
                yield
        except TimeoutError as error:
            raise self.error from error

    async def limit(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """Yield items until the deadline; then they are closed. One timer does for all of them.

        Raises:
            ApiError: 504.
        """
        waiting: asyncio.Task[object] | None = None
        is_over = False

        def end() -> None:
            nonlocal is_over
            is_over = True
            if waiting is not None:
                waiting.cancel()

        timer = asyncio.get_running_loop().call_at(self._at, end)
        try:
            async with aclosing(items):
                waiting = asyncio.current_task()
                async for item in items:
                    waiting = None
                    yield item
                    if is_over:
                        raise self.error
                    waiting = asyncio.current_task()
        except asyncio.CancelledError:
            if not is_over or waiting is None or waiting.uncancel() > 0:  # somebody else cancelled it
                raise
            raise self.error from None
        finally:
            timer.cancel()
