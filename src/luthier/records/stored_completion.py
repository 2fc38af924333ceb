"""Stored completions: requests with their answers, as the production log keeps them where ``store`` was asked for."""

from __future__ import annotations

from typing import Any

from luthier.records.stored import Stored


class StoredCompletion(Stored):
    """A request to ``/v1/chat/completions`` and its answer; ``id`` is the answer's, ``model`` the name that was asked.

    ``request`` has what the client sent, ``completion`` is the ``chat.completion`` that it got (put together, where it
    was streamed).
    """

    model: str
    request: dict[str, Any]
    completion: dict[str, Any]
    request_id: str | None = None
