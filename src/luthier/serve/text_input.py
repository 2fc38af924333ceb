"""What OpenAI lets a client give as a prompt or as an input: a string, tokens, or a list of either."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_TEXTS = 2048
Text = str | list[int]
RULE = "give a string, a list of strings, a list of tokens, or a list of lists of tokens"


def _texts(value: Any) -> list[Text]:
    """Return one text, or several, as a list of them."""
    texts = value if isinstance(value, list) else [value]
    if texts and all(type(one) is int for one in texts):
        texts = [texts]
    if not texts or len(texts) > MAX_TEXTS:
        raise PydanticCustomError("text_count", f"there are {len(texts)} texts; from 1 to {MAX_TEXTS} can be given")
    if not (all(isinstance(one, str) for one in texts) or all(_are_tokens(one) for one in texts)):
        raise PydanticCustomError("text_type", RULE)
    return texts


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


_TOKENS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STRINGS: dict[str, Any] = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_TEXTS}
_LISTS: dict[str, Any] = {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_TEXTS}
Texts = Annotated[
    list[Text],
    PlainValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS, _TOKENS, _LISTS]}),
]
