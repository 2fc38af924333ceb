"""The content of an example has one key, and an answer can be put in the place of another."""

from __future__ import annotations

from luthier.records.example import Conversation, Example, Message, ToolCall

QUESTION = Message(role="user", content="hi")
FIRST = Message(role="assistant", content="first")
GOOD = Message(role="assistant", content="good")
BAD = Message(role="assistant", content="bad", weight=0)


def test_content_key_covers_fields_messages_and_the_rejected_answer_but_not_where_it_stood() -> None:
    pair = Example(id="1", fields={"w": 1}, messages=(QUESTION, GOOD), rejected=(BAD,))
    assert pair.content_key() == pair.model_copy(update={"id": "2", "line": 7, "split": "test"}).content_key()
    others = [{"fields": {"w": 2}}, {"messages": (QUESTION, BAD)}, {"rejected": (FIRST,)}, {"rejected": None}]
    assert len({pair.content_key(), *(pair.model_copy(update=other).content_key() for other in others)}) == 5


def test_content_key_of_an_example_without_a_rejected_answer_is_what_it_was_before_there_were_any() -> None:
    key = Example(id="1", fields={"a": 1}).content_key()
    assert key == "321109e7e097a541745f205e8697c2217f4ad8a126d298375ab389326fb73c33"


def test_conversation_ending_in_another_answer_has_its_loss_there_alone() -> None:
    conversation = Conversation(example_id="1", messages=(QUESTION, FIRST, QUESTION, GOOD), rejected=(BAD,))
    turns = conversation.ending_in(conversation.rejected or ())
    assert [turn.content for turn in turns] == ["hi", "first", "hi", "bad"]
    assert [turn.weight for turn in turns if turn.role == "assistant"] == [0, 1]


def test_records_without_tools_have_the_texts_and_hashes_that_they_had_before_there_were_any() -> None:
    turns = (Message(role="user", content="hi"), Message(role="assistant", content="hello", weight=0))
    plain = Example(id="a", fields={"n": 1}, messages=turns, rejected=turns[1:], line=3)
    assert plain.model_dump_json() == (
        '{"id":"a","fields":{"n":1},"messages":[{"role":"user","content":"hi","weight":1},'
        '{"role":"assistant","content":"hello","weight":0}],'
        '"rejected":[{"role":"assistant","content":"hello","weight":0}],"split":null,"line":3}'
    )
    assert plain.content_key() == "4ff3fe07f871aba19d21321bb8baa29971e2e7be99d7c50bf69c3e2332371521"
    assert Example.model_validate_json(plain.model_dump_json()) == plain


def test_tools_and_calls_are_content() -> None:
    call = ToolCall(id="1", name="f", arguments="{}")
    turns = (Message(role="user", content="hi"), Message(role="assistant", content="", tool_calls=(call,)))
    example = Example(id="a", messages=turns, tools=({"type": "function", "function": {"name": "f"}},))
    assert Example.model_validate_json(example.model_dump_json()) == example
    others = [
        example.model_copy(update={"tools": ()}),
        example.model_copy(update={"messages": (turns[0], turns[1].model_copy(update={"tool_calls": ()}))}),
    ]
    assert len({one.content_key() for one in (example, *others)}) == 3
