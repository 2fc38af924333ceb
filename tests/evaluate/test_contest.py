import pytest

from luthier.errors import EngineError
from luthier.evaluate.contest import answers_of, sample, with_shots
from luthier.llm.scripted import ScriptedModel
from luthier.records.completion import Sampling
from luthier.records.example import Conversation, Message

GREEDY = Sampling(max_tokens=8)
LABELS = ("good", "bad")


def turn(role: str, text: str) -> Message:
    return Message(role=role, content=text)


def conversation(number: int, question: str, answer: str) -> Conversation:
    messages = (turn("system", "Judge."), turn("user", question), turn("assistant", answer))
    return Conversation(example_id=f"e{number}", messages=messages)


CONVERSATIONS = [conversation(0, "sun", "good"), conversation(1, "rain", "bad")]


def test_every_conversation_is_answered_in_order_with_its_label_read():
    model = ScriptedModel({"sun": "It is Good!", "rain": "hard to say"})
    answers = answers_of("base", model, CONVERSATIONS, GREEDY, "label", LABELS)
    assert [(a.example_id, a.contestant, a.text, a.expected, a.label) for a in answers] == [
        ("e0", "base", "It is Good!", "good", "good"),
        ("e1", "base", "hard to say", "bad", None),
    ]
    assert [(a.prompt_tokens, a.completion_tokens) for a in answers] == [(2, 3), (2, 3)]
    assert answers[0].seconds == answers[1].seconds >= 0
    assert answers[0].expected_logprob is None


def test_the_model_does_not_see_the_expected_answer():
    model = ScriptedModel(rule=lambda _: "x")
    answers_of("base", model, CONVERSATIONS, GREEDY, "text")
    assert model.asked[0] == (turn("system", "Judge."), turn("user", "sun"))


def test_a_text_task_reads_no_label():
    answers = answers_of("base", ScriptedModel(rule=lambda _: "good"), CONVERSATIONS, GREEDY, "text", LABELS)
    assert [a.label for a in answers] == [None, None]


def test_shots_stand_between_the_system_message_and_the_question():
    shots = (turn("user", "snow"), turn("assistant", "good"))
    model = ScriptedModel(rule=lambda _: "good")
    answers_of("few-shot", model, CONVERSATIONS, GREEDY, "label", LABELS, shots)
    assert [message.content for message in model.asked[1]] == ["Judge.", "snow", "good", "rain"]
    assert with_shots((turn("user", "sun"),), shots) == (*shots, turn("user", "sun"))


def test_progress_counts_requests():
    heard = []
    answers_of(
        "base", ScriptedModel(rule=lambda _: ""), CONVERSATIONS, GREEDY, "text", on_progress=lambda *n: heard.append(n)
    )
    assert heard == [(1, 2), (2, 2)]


def test_no_conversations_ask_nothing():
    assert answers_of("base", ScriptedModel(), [], GREEDY, "text") == []


def test_a_failing_engine_is_heard_of():
    with pytest.raises(EngineError):
        answers_of("base", ScriptedModel(rule=lambda _: "", fail_on=2), CONVERSATIONS, GREEDY, "text")


def test_a_sample_is_drawn_from_the_whole_file_and_keeps_its_order() -> None:
    ask = Message(role="user", content="?")
    rows = [
        Conversation(example_id=f"{i:03}", messages=(ask, Message(role="assistant", content=str(i // 50))))
        for i in range(200)
    ]
    drawn = sample(rows, 60, seed=0)
    assert {one.answer for one in drawn} == {"0", "1", "2", "3"}
    assert [one.example_id for one in drawn] == sorted(one.example_id for one in drawn)
    assert drawn == sample(rows, 60, seed=0)
    assert drawn != sample(rows, 60, seed=1)
    assert sample(rows, 500, seed=0) == rows
