import pytest

from luthier.errors import EngineError, InputError
from luthier.llm.model import LanguageModel
from luthier.llm.scripted import ScriptedModel
from luthier.records.completion import Sampling
from luthier.records.example import Message

GREEDY = Sampling(max_tokens=8)


def user(text: str) -> list[Message]:
    return [Message(role="system", content="Be brief."), Message(role="user", content=text)]


def test_answers_come_from_the_mapping_and_then_from_the_rule():
    model: LanguageModel = ScriptedModel({"hello": "hi"}, lambda prompt: prompt[-1].content.upper())
    completions = model.answer([user("hello"), user("how are you")], GREEDY)
    assert [completion.text for completion in completions] == ["hi", "HOW ARE YOU"]
    assert [completion.finish_reason for completion in completions] == ["stop", "stop"]


def test_tokens_are_counted_as_words():
    (completion,) = ScriptedModel({"one two": "a b  c"}).answer([user("one two")], GREEDY)
    assert (completion.prompt_tokens, completion.completion_tokens) == (4, 3)


def test_an_answer_ends_at_max_tokens_and_at_a_stop_string():
    model = ScriptedModel(rule=lambda _: "one two\nthree four")
    (cut,) = model.answer([user("count")], Sampling(max_tokens=3))
    assert (cut.text, cut.finish_reason, cut.completion_tokens) == ("one two\nthree", "length", 3)
    (stopped,) = model.answer([user("count")], Sampling(max_tokens=3, stop=("four", "\n")))
    assert (stopped.text, stopped.finish_reason) == ("one two", "stop")


def test_every_answer_is_reported_with_its_place():
    heard = []
    ScriptedModel(rule=lambda _: "x").answer(
        [user("a"), user("b")], GREEDY, lambda index, completion: heard.append((index, completion.text))
    )
    assert heard == [(0, "x"), (1, "x")]


def test_a_prompt_that_fills_the_context_is_refused_before_any_is_answered():
    model = ScriptedModel(rule=lambda _: "a b c d", context_length=5)
    with pytest.raises(InputError, match="6 tokens"):
        model.answer([user("a"), user("a b c d")], GREEDY)
    assert model.asked == []
    (completion,) = model.answer([user("a")], GREEDY)
    assert (completion.text, completion.finish_reason) == ("a b", "length")


def test_the_scripted_prompt_fails_and_the_next_does_not():
    model = ScriptedModel(rule=lambda _: "x", fail_on=2)
    model.answer([user("a")], GREEDY)
    with pytest.raises(EngineError, match="prompt 2"):
        model.answer([user("b")], GREEDY)
    assert [prompt[-1].content for prompt in model.asked] == ["a"]


def test_a_prompt_without_an_answer_and_a_closed_model_are_errors():
    model = ScriptedModel({"a": "b"}, name="parrot")
    with pytest.raises(EngineError, match="parrot has no answer to 'c'"):
        model.answer([user("c")], GREEDY)
    model.close()
    with pytest.raises(EngineError, match="parrot is closed"):
        model.answer([user("a")], GREEDY)
