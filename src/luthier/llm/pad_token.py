"""The token that pads texts for a decoder that labels or scores them: one in which no text can end.

transformers reads such a model at the last token that is not the padding token. Many bases pad with their end-of-turn
token, in which a scored conversation ends: then it would be read one token early.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

FILES = ("tokenizer_config.json", "special_tokens_map.json")


def pad_token(folder: Path) -> tuple[int, str] | None:
    """Return id and text of a model folder's token that suits: its own if it does, else another special token.

    None where every special token may end a text.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends: set[int | None] = {
        token for name in ("config.json", "generation_config.json") for token in _ids(_read(folder / name))
    }
    settings = _read(folder / "tokenizer_config.json")
    known = {name: tokenizer.token_to_id(_text(settings.get(f"{name}_token"))) for name in ("eos", "pad")}
    unknown = _read(folder / "tokenizer.json").get("model", {}).get("unk_token")
    ends |= {known["eos"], tokenizer.token_to_id(unknown or ""), *tokenizer.encode("a").ids}
    special = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    free = [id for id in special if id not in ends]
    if not free:
        return None
    best = min(free, key=lambda id: (id != known["pad"], "pad" not in special[id].lower(), id))
    return best, special[best]


def write_pad_token(folder: Path, text: str) -> None:
    """Let the tokenizer of a model folder pad with a token."""
    for path in (folder / name for name in FILES):
        if path.is_file():
            path.write_text(json.dumps(_read(path) | {"pad_token": text}, indent=2, ensure_ascii=False), "utf-8")


def _ids(config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token or "")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
