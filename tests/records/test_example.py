"""The content of an example has one key, and an answer can be put in the place of another."""

from __future__ import annotations

from luthier.records.example import Conversation, Example, Message

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
