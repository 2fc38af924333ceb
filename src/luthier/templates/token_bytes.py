"""What each token of a byte-level tokenizer adds to a text: the fast way to decode an answer as it comes."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders


def _byte_of_letter() -> dict[str, int]:
    """Return which byte each letter of a byte-level vocabulary stands for.

    Source: ``bytes_to_unicode`` of GPT-2 (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


class TokenBytes(dict[int, bytes]):
    """The bytes of tokens, each looked up when it is first asked for. Make it with :meth:`of`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenBytes | None:
        """Return the bytes of a tokenizer's tokens; None where the text of a token depends on its neighbours."""
        return cls(tokenizer) if isinstance(tokenizer.decoder, decoders.ByteLevel) else None

    def __missing__(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token) or ""
        try:
            found = bytes(BYTE_OF_LETTER[letter] for letter in text)
        except KeyError:  # an added token, which is written as it is
            found = text.encode()
        self[token] = found
        return found
