"""Examples become conversations, and conversations become what a model trains on; nothing is lost in silence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_format import END, START, WITHOUT_END_OF_TURN, assistant, system, user, write_chat_model

from luthier.errors import InputError
from luthier.records.example import Conversation, Example, Message
from luthier.records.template import Template
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import RenderPolicy, TemplateRenderer, TokenizedExample, tokenize

TEMPLATE = Template(system="Judge the {{kind}}.", user="{{text}}", assistant="{{label}}")
EXAMPLE = Example(id="e1", fields={"kind": "film", "text": "Great <b>", "label": "positive"})
LONG = "word by word the user goes on and on; " * 20


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.load(write_chat_model(tmp_path_factory.mktemp("chatml")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.load(write_chat_model(tmp_path_factory.mktemp("endless"), WITHOUT_END_OF_TURN))


def talk(number: int, *messages: Message) -> Conversation:
    return Conversation(example_id=f"e{number}", messages=messages)


def text(chat_format: ChatFormat, example: TokenizedExample) -> str:
    return str(chat_format.tokenizer.decode(example.tokens, skip_special_tokens=False))


def learned(chat_format: ChatFormat, example: TokenizedExample) -> str:
    tokens = [token for token, has_loss in zip(example.tokens, example.loss_mask, strict=True) if has_loss]
    return str(chat_format.tokenizer.decode(tokens, skip_special_tokens=False))


# Examples → messages


def test_template_makes_the_three_messages_from_the_fields() -> None:
    conversation = TemplateRenderer(TEMPLATE, ["kind", "text", "label"]).conversation(EXAMPLE)
    assert conversation.messages == (system("Judge the film."), user("Great <b>"), assistant("positive"))
    assert (conversation.example_id, conversation.answer, conversation.prompt) == (
        "e1",
        "positive",
        conversation.messages[:2],
    )


def test_template_without_system_makes_two_messages() -> None:
    renderer = TemplateRenderer(Template(user="{{text}}", assistant="{{label}}"), ["text", "label"])
    assert [message.role for message in renderer.conversation(EXAMPLE).messages] == ["user", "assistant"]


def test_fields_of_all_texts_are_known() -> None:
    assert TemplateRenderer(TEMPLATE, ["kind", "text", "label"]).fields == {"kind", "text", "label"}
    assert TemplateRenderer(None, []).fields == frozenset()


def test_unknown_field_is_refused_with_the_text_that_uses_it() -> None:
    with pytest.raises(InputError, match="The assistant template uses fields"):
        TemplateRenderer(TEMPLATE, ["kind", "text", "labels"])


def test_conversation_of_an_example_with_messages_is_taken_as_it_is() -> None:
    example = Example(id="e1", messages=(user("{{text}}"), assistant("yes", 0)))
    assert TemplateRenderer(None, []).conversation(example).messages == example.messages


def test_example_of_fields_without_a_template_is_refused_with_the_command_that_makes_one() -> None:
    with pytest.raises(InputError, match="e1 has fields but no messages") as caught:
        TemplateRenderer(None, []).conversation(EXAMPLE)
    assert caught.value.hint is not None
    assert "luthier template save" in caught.value.hint


# Messages → what is trained


def test_tokens_end_with_the_last_token_that_is_learned(chatml: ChatFormat) -> None:
    turns = [user("one"), assistant("first"), user("two"), assistant("second", 0)]
    (example,), report = tokenize([talk(1, *turns)], chatml, RenderPolicy(max_tokens=256))
    assert text(chatml, example) == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>"
    assert learned(chatml, example) == "first<|im_end|>"
    assert example.example_id == "e1"
    assert (report.rendered, report.truncated, report.appended, dict(report.dropped)) == (1, 0, 0, {})


NOTHING_TO_LEARN = [
    (assistant(""),),
    (assistant("  \n"),),
    (assistant("yes", 0),),
    (assistant("", 1), user("two"), assistant("yes", 0)),
    (),
]


@pytest.mark.parametrize("answers", NOTHING_TO_LEARN)
def test_example_with_nothing_to_learn_is_refused_or_dropped(chatml: ChatFormat, answers: tuple[Message, ...]) -> None:
    conversations = [talk(1, user("one"), *answers), talk(2, user("one"), assistant("yes"))]
    with pytest.raises(InputError, match="1 examples cannot be learned") as caught:
        tokenize(conversations, chatml, RenderPolicy(max_tokens=256))
    assert "example e1: no token carries loss" in caught.value.problems[0]
    kept, report = tokenize(conversations, chatml, RenderPolicy(max_tokens=256, empty_mask="drop"))
    assert [example.example_id for example in kept] == ["e2"]
    assert (report.rendered, dict(report.dropped)) == (1, {"empty_mask": 1})


def test_missing_end_of_turn_is_refused_dropped_or_appended(endless: ChatFormat) -> None:
    conversations = [talk(1, user("one"), assistant("first")), talk(2, user("two"), assistant("second"))]
    with pytest.raises(InputError, match="2 examples cannot be learned") as caught:
        tokenize(conversations, endless, RenderPolicy(max_tokens=256))
    assert all("would never stop" in problem for problem in caught.value.problems)
    with pytest.raises(InputError, match="No example is left") as caught:
        tokenize(conversations, endless, RenderPolicy(max_tokens=256, missing_end_of_turn="drop"))
    assert caught.value.problems == ("missing_end_of_turn: 2",)
    kept, report = tokenize(conversations, endless, RenderPolicy(max_tokens=256, missing_end_of_turn="append"))
    assert [learned(endless, example) for example in kept] == ["first\n<|im_end|>", "second\n<|im_end|>"]
    assert (report.rendered, report.appended) == (2, 2)


def test_every_answer_that_is_learned_gets_its_end_of_turn(endless: ChatFormat) -> None:
    conversation = talk(
        1, user("one"), assistant("first"), user("two"), assistant("second", 0), user("three"), assistant("third")
    )
    policy = RenderPolicy(max_tokens=256, missing_end_of_turn="append")
    (example,), report = tokenize([conversation], endless, policy)
    assert learned(endless, example) == "first\n<|im_end|>third\n<|im_end|>"
    assert report.appended == 1
    before = endless.render(conversation.messages).tokens
    assert [token for token in example.tokens if token != END] == [token for token in before if token != END]
    assert len(example.tokens) == len(before) + 2
    with pytest.raises(InputError, match="cannot be learned"):
        tokenize([conversation], endless, policy.model_copy(update={"max_tokens": len(before) + 1}))


def test_appended_end_of_turn_counts_towards_the_limit(endless: ChatFormat) -> None:
    conversation = talk(1, user("one"), assistant("first"))
    length = len(endless.render(conversation.messages).tokens)
    policy = RenderPolicy(max_tokens=length, missing_end_of_turn="append")
    with pytest.raises(InputError, match="cannot be learned"):
        tokenize([conversation], endless, policy)
    (example,), _ = tokenize([conversation], endless, policy.model_copy(update={"max_tokens": length + 1}))
    assert len(example.tokens) == length + 1
    (shorter,), report = tokenize([conversation], endless, policy.model_copy(update={"too_long": "truncate"}))
    assert (len(shorter.tokens), shorter.tokens[-1], report.truncated) == (length, END, 1)


def test_limit_holds_for_what_is_trained_not_for_what_follows_the_answer(chatml: ChatFormat) -> None:
    conversation = talk(1, user("one"), assistant("first"))
    length = len(chatml.render(conversation.messages).tokens) - 1  # the template ends in a new line
    assert len(tokenize([conversation], chatml, RenderPolicy(max_tokens=length))[0][0].tokens) == length
    with pytest.raises(InputError, match=f"limit {length - 1} tokens"):
        tokenize([conversation], chatml, RenderPolicy(max_tokens=length - 1))


def test_example_that_is_too_long_is_refused_or_dropped(chatml: ChatFormat) -> None:
    conversations = [talk(1, user(LONG), assistant("yes")), talk(2, user("two"), assistant("no"))]
    with pytest.raises(InputError) as caught:
        tokenize(conversations, chatml, RenderPolicy(max_tokens=64))
    assert caught.value.problems == ("example e1: longer than the limit",)
    kept, report = tokenize(conversations, chatml, RenderPolicy(max_tokens=64, too_long="drop"))
    assert [example.example_id for example in kept] == ["e2"]
    assert dict(report.dropped) == {"too_long": 1}


def test_truncation_shortens_the_longest_prompt_message_and_nothing_else(chatml: ChatFormat) -> None:
    conversations = [
        talk(1, system("Judge."), user(LONG), assistant("positive")),
        talk(2, user("two"), assistant("no")),
    ]
    kept, report = tokenize(conversations, chatml, RenderPolicy(max_tokens=64, too_long="truncate"))
    assert (report.rendered, report.truncated, dict(report.dropped)) == (2, 1, {})
    assert len(kept[0].tokens) == 64
    before, after = text(chatml, kept[0]).split("<|im_start|>user\n")
    content, rest = after.split("<|im_end|>", 1)
    assert before == "<|im_start|>system\nJudge.<|im_end|>\n"
    assert content
    assert LONG.startswith(content)
    assert rest == "\n<|im_start|>assistant\npositive<|im_end|>"
    assert learned(chatml, kept[0]) == "positive<|im_end|>"
    assert text(chatml, kept[1]).startswith("<|im_start|>user\ntwo<|im_end|>")


def test_truncation_never_cuts_a_character_in_two(chatml: ChatFormat) -> None:
    for max_tokens in range(40, 52):
        policy = RenderPolicy(max_tokens=max_tokens, too_long="truncate")
        (example,), _ = tokenize([talk(1, user("日本語の文" * 20), assistant("yes"))], chatml, policy)
        content = text(chatml, example).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert ("日本語の文" * 20).startswith(content)
        assert max_tokens - 3 < len(example.tokens) <= max_tokens


def test_answer_that_does_not_fit_by_itself_is_never_cut(chatml: ChatFormat) -> None:
    conversations = [talk(1, user("one"), assistant(LONG)), talk(2, user("two"), assistant("no"))]
    kept, report = tokenize(conversations, chatml, RenderPolicy(max_tokens=64, too_long="truncate"))
    assert [example.example_id for example in kept] == ["e2"]
    assert (report.truncated, dict(report.dropped)) == (0, {"too_long": 1})


def test_all_examples_that_are_refused_are_named_at_once(chatml: ChatFormat) -> None:
    conversations = [talk(n, user(LONG), assistant("yes")) for n in range(3)] + [talk(9, user("x"), assistant(" "))]
    with pytest.raises(InputError, match="4 examples") as caught:
        tokenize(conversations, chatml, RenderPolicy(max_tokens=64))
    assert len(caught.value.problems) == 4


def test_no_examples_at_all_are_refused(chatml: ChatFormat) -> None:
    with pytest.raises(InputError, match="No example is left"):
        tokenize([], chatml, RenderPolicy(max_tokens=64))


@settings(deadline=None)
@given(question=st.text(max_size=80), answer=st.text(min_size=1, max_size=20), max_tokens=st.integers(20, 80))
def test_truncated_example_fits_and_keeps_its_answer(
    chatml: ChatFormat, question: str, answer: str, max_tokens: int
) -> None:
    policy = RenderPolicy(max_tokens=max_tokens, too_long="truncate", empty_mask="drop")
    safe = talk(0, user(""), assistant("a"))
    kept, report = tokenize([talk(1, user(question), assistant(answer)), safe], chatml, policy)
    assert len(kept) + sum(report.dropped.values()) == 2
    for example in kept[:-1]:
        assert len(example.tokens) <= max_tokens
        assert len(example.tokens) == len(example.loss_mask)
        assert learned(chatml, example) == f"{answer}<|im_end|>"
        assert example.tokens.count(START) == 2
