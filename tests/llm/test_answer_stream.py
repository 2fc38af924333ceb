from __future__ import annotations

from pathlib import Path

import pytest

from luthier.llm.answer_stream import AnswerText
from luthier.templates.chat_format import ChatFormat


@pytest.fixture(scope="module")
def chat_format(tiny_base: Path) -> ChatFormat:
    return ChatFormat.load(tiny_base)


def pieces(chat_format: ChatFormat, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], AnswerText]:
    answer = AnswerText(chat_format, stop)
    parts = []
    for token in chat_format.encode(text):
        parts.append(answer.add([token]))
        if answer.stopped:
            break
    return [*parts, answer.finish()], answer


def test_characters_of_several_bytes_come_whole(chat_format: ChatFormat) -> None:
    text = "Grüße 你好 🎻 naïve"
    assert len(chat_format.encode("🎻")) == 4
    parts, _ = pieces(chat_format, text)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


def test_a_character_cut_in_half_by_the_length_limit_is_left_out(chat_format: ChatFormat) -> None:
    answer = AnswerText(chat_format)
    tokens = chat_format.encode("ok 🎻")[:-1]
    assert "".join([*(answer.add([token]) for token in tokens), answer.finish()]) == "ok "


def test_text_ends_before_a_stop_string_that_spans_tokens(chat_format: ChatFormat) -> None:
    parts, answer = pieces(chat_format, "one two three STOPPED four", ("STOP", "never"))
    assert "".join(parts) == "one two three "
    assert answer.stopped


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_clear(chat_format: ChatFormat) -> None:
    answer = AnswerText(chat_format, ("<END>",))
    assert answer.add(chat_format.encode("a<EN")) == "a"
    assert answer.add(chat_format.encode("x")) == "<ENx"
    assert answer.add(chat_format.encode("<E")) == ""
    assert answer.finish() == "<E"
    assert not answer.stopped


def test_the_first_of_several_stop_strings_in_the_text_counts(chat_format: ChatFormat) -> None:
    parts, _ = pieces(chat_format, "alpha beta gamma", ("gamma", "beta"))
    assert "".join(parts) == "alpha "


def test_the_end_of_turn_token_has_no_text(chat_format: ChatFormat) -> None:
    answer = AnswerText(chat_format)
    text = answer.add([*chat_format.encode("hello"), min(chat_format.stop_tokens)])
    assert text + answer.finish() == "hello"
