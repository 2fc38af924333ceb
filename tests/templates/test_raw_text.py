"""Documents become pieces that hold every token once, with loss on all but the first of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_format import END, END_OF_TEXT, START, write_chat_model
from tokenizers import Tokenizer, processors

from luthier.errors import InputError
from luthier.templates.chat_format import ChatFormat
from luthier.templates.raw_text import BATCH_DOCUMENTS, iter_documents
from luthier.templates.renderer import RenderReport


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.load(write_chat_model(tmp_path_factory.mktemp("chatml")))


@settings(deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=4), length=st.integers(2, 20))
def test_pieces_hold_every_token_of_a_document_and_its_end_once(
    chatml: ChatFormat, texts: list[str], length: int
) -> None:
    report = RenderReport()
    documents = [(f"d{number}", f"x{text}") for number, text in enumerate(texts)]
    pieces = list(iter_documents(documents, chatml, length=length, report=report))
    whole = [token for _, text in documents for token in (*chatml.encode(text), END)]
    # A document of length * n + 1 tokens leaves its last one out.
    assert sum(len(piece.tokens) for piece in pieces) == len(whole) - report.dropped["short_piece"]
    assert report.rendered == len(pieces)
    for piece in pieces:
        assert 2 <= len(piece.tokens) <= length
        assert piece.loss_mask == [False] + [True] * (len(piece.tokens) - 1)
    if not report.dropped:
        assert [token for piece in pieces for token in piece.tokens] == whole


def test_pieces_are_numbered_and_short_ones_and_empty_documents_counted(chatml: ChatFormat) -> None:
    eight = "abcdefgh"
    tokens = [*chatml.encode(eight), END]
    length = len(tokens) - 1
    report, documents = RenderReport(), [("a", eight), ("b", " \n"), ("c", eight * 2)]
    pieces = list(iter_documents(documents, chatml, length=length, report=report))
    assert [piece.example_id for piece in pieces][:2] == ["a#1", "c#1"]
    assert pieces[0].tokens == tokens[:-1]
    assert report.dropped["empty_document"] == 1
    assert report.dropped["short_piece"] >= 1


def test_beginning_token_of_the_tokenizer_stands_first_and_an_end_is_not_doubled(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", START), ("<|im_end|>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (piece,) = iter_documents([("a", "user")], ChatFormat.load(folder), length=99)
    assert (piece.tokens[0], piece.tokens[-1], piece.tokens.count(END)) == (START, END, 1)


def test_end_of_text_is_the_tokenizers_own_end_and_not_another_stop_token(tmp_path: Path) -> None:
    settings_ = {"eos_token": "<|endoftext|>"}
    folder = write_chat_model(tmp_path, tokenizer_config=settings_, generation_config={"eos_token_id": [END]})
    assert ChatFormat.load(folder).end_of_text == END_OF_TEXT
    nameless = write_chat_model(tmp_path / "nameless", tokenizer_config={})
    assert ChatFormat.load(nameless).end_of_text == END


def test_documents_are_read_as_they_are_needed(chatml: ChatFormat) -> None:
    read = 0

    def corpus() -> Iterator[tuple[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield f"d{read}", "the user asks the assistant"

    pieces = iter_documents(corpus(), chatml, length=8)
    assert read == 0
    assert next(pieces).example_id == "d1#1"
    assert read <= BATCH_DOCUMENTS


@pytest.mark.parametrize("length", [1, 257])
def test_length_outside_the_context_is_refused_at_once(chatml: ChatFormat, length: int) -> None:
    with pytest.raises(InputError, match="must be 2 to 256, the context of the base model"):
        iter_documents([("a", "text")], chatml, length=length)


def test_corpus_of_nothing_is_refused(chatml: ChatFormat) -> None:
    with pytest.raises(InputError, match="No text is left") as caught:
        list(iter_documents([("a", " ")], chatml, length=8))
    assert caught.value.problems == ("empty_document: 1",)
