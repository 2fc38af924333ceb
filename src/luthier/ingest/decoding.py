"""What every reader shares: bytes that do not decode are marked, not lost, and then named to the user."""

from __future__ import annotations

import codecs
import re

MAX_LINE_CHARS = 16_000_000

# Bytes that do not decode become one lone surrogate, U+DC00 + the byte: no decoder gives these for good text.
UNDECODABLE = re.compile("[\udc00-\udcff]")
ERROR_HANDLER = "luthier.mark_undecodable"


def _mark_undecodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(0xDC00 + error.object[error.start]), error.end


codecs.register_error(ERROR_HANDLER, _mark_undecodable)


def text_problem(text: str, encoding: str) -> str | None:
    """Return why a text that was read with ``ERROR_HANDLER`` cannot be taken; None where it can."""
    if text.isascii():
        return "has a NUL character" if "\0" in text else None
    undecodable = UNDECODABLE.search(text)
    if undecodable:
        byte = ord(undecodable.group()) - 0xDC00
        return (
            f"byte 0x{byte:02X} is not valid {encoding}: name the encoding of the file with --encoding, "
            "for example --encoding cp1252"
        )
    return "has a NUL character" if "\0" in text else None
