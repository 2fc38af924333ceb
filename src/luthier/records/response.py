"""Responses as they are kept: so that they can be read again, and so that a conversation can go on from one."""

from __future__ import annotations

from typing import Any

from luthier.records.stored import Stored

Item = dict[str, Any]
"""An input or output item as OpenAI's Responses API writes it: a message, a function's call, or its output."""


class StoredResponse(Stored):
    """A finished response; ``model`` is the name that was asked.

    ``response`` is what the client got. ``input`` is all that the model was given beside the instructions: the items of
    the conversation that it goes on from, and then its own. ``expires_at`` is in Unix seconds; then it is deleted.
    """

    model: str
    response: dict[str, Any]
    input: tuple[Item, ...]
    expires_at: int

    @property
    def conversation(self) -> tuple[Item, ...]:
        """The items that a response which goes on from this one begins with."""
        return (*self.input, *self.response["output"])
