"""What messages say stays text: special tokens in a content are encoded as the letters that they are written with.

A chat template joins contents and special tokens to one text, in which nobody can tell one from the other. So special
tokens in a content are replaced by stand-ins before it is rendered, in letters that nobody can guess. Where a text has
stand-ins, its other special tokens get names that a copy of the tokenizer knows them by; then the stand-ins become
what they stand for, and the copy, to which they are text, encodes the whole. Almost all texts have no stand-ins, and go
the usual way.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer


class PlainContent:
    """Keeps the special tokens of one tokenizer out of contents; without a tokenizer there are none.

    Args:
        tokenizer: Whose special tokens.
        further: Tokens that count as special, whatever the tokenizer says of them.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, further: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if tokenizer is not None else {}
        counted = set(further)
        contents = {token.content for id, token in added.items() if token.special or id in counted} - {""}
        self._contents = sorted(contents, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._contents))) if contents else None
        secret = secrets.token_hex(16)
        self._mark = f"a{secret}"
        self._stand_in = re.compile(rf"a{secret}(\d+)z")
        self._names = {content: f"b{secret}{number}z" for number, content in enumerate(self._contents)}
        self._renamed: Tokenizer | None = None

    def kept(self, value: Any) -> Any:
        """Return a text, or all texts of a list or object, with stand-ins for special tokens."""
        if isinstance(value, str):
            if self._special is None or self._special.search(value) is None:
                return value
            return self._special.sub(lambda found: f"{self._mark}{self._contents.index(found[0])}z", value)
        if isinstance(value, dict):
            return {self.kept(key): self.kept(item) for key, item in value.items()}
        return [self.kept(item) for item in value] if isinstance(value, list | tuple) else value

    def shown(self, text: str) -> str:
        """Return a text with what the stand-ins stand for."""
        if self._mark not in text:
            return text
        return self._stand_in.sub(lambda found: self._contents[int(found[1])], text)

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of a text that has stand-ins; None where it has none."""
        if self._special is None or self._mark not in text:
            return None
        if self._renamed is None:
            self._renamed = self._with_other_names()
        named = self._special.sub(lambda found: self._names[found[0]], text)
        return list(self._renamed.encode(self.shown(named), add_special_tokens=False).ids)

    def _with_other_names(self) -> Tokenizer:
        """Return the tokenizer with other names for its special tokens, so that theirs are text to it."""
        assert self._tokenizer is not None  # noqa: S101 - it has special tokens
        described = json.loads(self._tokenizer.to_str())
        for token in described["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        model = described["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {self._names.get(text, text): id for text, id in model["vocab"].items()}
        elif "vocab" in model:  # a list of (text, score)
            model["vocab"] = [[self._names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._names.get(model["unk_token"], model["unk_token"])
        described["post_processor"] = None  # it adds special tokens, which is never asked for
        return Tokenizer.from_str(json.dumps(described))
