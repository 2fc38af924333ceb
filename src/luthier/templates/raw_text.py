"""THE renderer for raw text: documents → pieces of tokens, with loss on every token that has one before it.

A document's tokens are those that the model's own tokenizer makes of it (with its token for the beginning of a text,
where it has one), and the end-of-text token. They are cut into consecutive pieces that do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from luthier.errors import InputError
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import RenderReport, TokenizedExample

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 4_000_000
MIN_PIECE_TOKENS = 2

Document = tuple[str, str]
"""The id and the text of a document."""


def iter_documents(
    texts: Iterable[Document], chat_format: ChatFormat, *, length: int, report: RenderReport | None = None
) -> Iterator[TokenizedExample]:
    """Yield documents as pieces of at most ``length`` tokens, one by one; memory does not grow with their number.

    The pieces of the document ``a`` are called ``a#1``, ``a#2`` and so on. The first token of a piece has no loss. A
    last piece of a single token is left out (``short_piece`` in the report), and so is a document of white space
    (``empty_document``).

    Args:
        texts: The id and the text of each document.
        chat_format: Whose tokenizer and end-of-text token are used.
        length: The most tokens of a piece.
        report: Counts, as they become known, pieces (``rendered``) and what was left out.

    Raises:
        InputError: ``length`` is below 2 or above the model's context; or, once all of them were read, nothing is left.
    """
    if not MIN_PIECE_TOKENS <= length <= chat_format.context_length:
        raise InputError(
            f"Pieces of {length} tokens cannot be learned: "
            f"it must be {MIN_PIECE_TOKENS} to {chat_format.context_length}, the context of the base model."
        )
    return _pieces(texts, chat_format, length, report or RenderReport())


def _pieces(
    texts: Iterable[Document], chat_format: ChatFormat, length: int, report: RenderReport
) -> Iterator[TokenizedExample]:
    for batch in _batches(texts, report):
        encodings = chat_format.tokenizer.encode_batch_fast([text for _, text in batch])
        for (document_id, _), encoding in zip(batch, encodings, strict=True):
            yield from _cut(document_id, _ended(encoding.ids, chat_format.end_of_text), length, report)
    if not report.rendered:
        raise report.nothing_left("text")


def _batches(texts: Iterable[Document], report: RenderReport) -> Iterator[list[Document]]:
    """Gather documents that are tokenized together, on all cores."""
    batch: list[Document] = []
    characters = 0
    for document_id, text in texts:
        if not text.strip():
            report.dropped["empty_document"] += 1
            continue
        batch.append((document_id, text))
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ended(tokens: list[int], end_of_text: int) -> list[int]:
    return tokens if tokens and tokens[-1] == end_of_text else [*tokens, end_of_text]


def _cut(document_id: str, tokens: list[int], length: int, report: RenderReport) -> Iterator[TokenizedExample]:
    for number, start in enumerate(range(0, len(tokens), length), 1):
        piece = tokens[start : start + length]
        if len(piece) < MIN_PIECE_TOKENS:
            report.dropped["short_piece"] += 1
            continue
        report.rendered += 1
        yield TokenizedExample(f"{document_id}#{number}", piece, [False] + [True] * (len(piece) - 1))
