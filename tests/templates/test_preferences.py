"""Pairs and thumbs: whole conversations with loss on the final answer alone, under the same policies as all others."""

from __future__ import annotations

import pytest
from test_chat_format import END, WITHOUT_END_OF_TURN, assistant, system, user, write_chat_model
from test_renderer import LONG, learned, text

from luthier.errors import InputError
from luthier.records.columns import Columns
from luthier.records.example import Conversation, Example, Message
from luthier.records.template import Template
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import (
    RenderPolicy,
    RenderReport,
    TemplateRenderer,
    TokenizedExample,
    TokenizedPair,
    iter_pairs,
    iter_thumbs,
    tokenize,
)

POLICY = RenderPolicy(max_tokens=256)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.load(write_chat_model(tmp_path_factory.mktemp("chatml")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.load(write_chat_model(tmp_path_factory.mktemp("endless"), WITHOUT_END_OF_TURN))


def pair(number: int, good: str, bad: str, *prompt: Message) -> Conversation:
    messages = (*(prompt or (user("one"),)), assistant(good))
    return Conversation(example_id=f"e{number}", messages=messages, rejected=(assistant(bad),))


def thumb(number: int, answer: str, up: bool | None) -> Conversation:
    return Conversation(example_id=f"e{number}", messages=(user("one"), assistant(answer)), thumb=up)


def read_pairs(
    pairs: list[Conversation], chat_format: ChatFormat, policy: RenderPolicy
) -> tuple[list[TokenizedPair], RenderReport]:
    report = RenderReport()
    return list(iter_pairs(pairs, chat_format, policy, report)), report


def read_thumbs(
    answers: list[Conversation], chat_format: ChatFormat, policy: RenderPolicy
) -> tuple[list[TokenizedExample], RenderReport]:
    report = RenderReport()
    return list(iter_thumbs(answers, chat_format, policy, report)), report


# Examples → conversations


def test_template_with_a_rejected_text_makes_both_answers() -> None:
    renderer = TemplateRenderer(Template(user="{{q}}", assistant="{{a}}", rejected="{{b}}"), ["q", "a", "b"])
    conversation = renderer.conversation(Example(id="e1", fields={"q": "?", "a": "yes", "b": "no"}))
    assert conversation.messages == (user("?"), assistant("yes"))
    assert conversation.rejected == (assistant("no"),)
    assert renderer.fields == {"q", "a", "b"}


def test_unknown_field_of_the_rejected_text_is_refused() -> None:
    with pytest.raises(InputError, match="The rejected template uses fields"):
        TemplateRenderer(Template(user="{{q}}", assistant="{{a}}", rejected="{{c}}"), ["q", "a"])


def test_columns_give_conversations_their_weight_margin_and_thumb() -> None:
    fields = {"w": "2", "m": 0.5, "liked": "up"}
    examples = [Example(id="e1", fields=fields, messages=(user("one"), assistant("yes")), rejected=(assistant("no"),))]
    renderer = TemplateRenderer(None, ["w", "m", "liked"])
    (made,) = renderer.conversations(examples, Columns(weight="w", margin="m", thumb="liked"))
    assert (made.weight, made.margin, made.thumb, made.rejected) == (2.0, 0.5, True, (assistant("no"),))
    (plain,) = renderer.conversations(examples, Columns())
    assert (plain.weight, plain.margin, plain.thumb) == (1.0, 0.0, None)


def test_unknown_columns_are_refused_with_the_closest_field() -> None:
    with pytest.raises(InputError, match=r"weight column 'weigt' is unknown. Did you mean 'weight'\?"):
        TemplateRenderer(None, ["weight"]).conversations([], Columns(weight="weigt"))


def test_weight_of_a_conversation_goes_into_what_is_trained(chatml: ChatFormat) -> None:
    conversation = pair(1, "yes", "no").model_copy(update={"weight": 0.25})
    assert tokenize([conversation], chatml, POLICY)[0][0].weight == 0.25


# Pairs


def test_both_sides_are_whole_conversations_with_loss_on_the_final_answer(chatml: ChatFormat) -> None:
    talk = pair(1, "good", "bad", user("one"), assistant("first"), user("two"))
    (made,), report = read_pairs([talk.model_copy(update={"weight": 2.0, "margin": 0.5})], chatml, POLICY)
    start = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
    assert text(chatml, made.chosen) == f"{start}<|im_start|>assistant\ngood<|im_end|>"
    assert text(chatml, made.rejected) == f"{start}<|im_start|>assistant\nbad<|im_end|>"
    assert [learned(chatml, side) for side in (made.chosen, made.rejected)] == ["good<|im_end|>", "bad<|im_end|>"]
    assert (made.example_id, made.weight, made.margin, report.rendered) == ("e1", 2.0, 0.5, 1)


def test_conversations_without_a_rejected_answer_are_all_named(chatml: ChatFormat) -> None:
    single = [thumb(1, "yes", None), thumb(2, "no", None)]
    with pytest.raises(InputError, match="2 examples have no rejected answer") as caught:
        read_pairs([*single, pair(3, "yes", "no")], chatml, POLICY)
    assert caught.value.problems == ("example e1 has no rejected answer", "example e2 has no rejected answer")


def test_pairs_that_cannot_be_learned_are_refused_or_dropped(chatml: ChatFormat) -> None:
    pairs = [pair(1, "yes", " yes"), pair(2, "yes", " "), pair(3, "", "no"), pair(4, "yes", LONG), pair(5, "a", "b")]
    policy = RenderPolicy(max_tokens=64)
    with pytest.raises(InputError, match="4 examples cannot be learned") as caught:
        read_pairs(pairs, chatml, policy)
    assert "answer are equal" in caught.value.problems[0]
    dropping = policy.model_copy(update={"equal_answers": "drop", "empty_mask": "drop", "too_long": "drop"})
    kept, report = read_pairs(pairs, chatml, dropping)
    assert [made.example_id for made in kept] == ["e5"]
    assert dict(report.dropped) == {"equal_answers": 1, "empty_mask": 2, "too_long": 1}


def test_truncation_gives_both_sides_the_same_prompt(chatml: ChatFormat) -> None:
    policy = RenderPolicy(max_tokens=64, too_long="truncate")
    talk = pair(1, "yes", "no, not at all, never", system("Judge."), user(LONG))
    (made,), report = read_pairs([talk], chatml, policy)
    prompts = [text(chatml, side).split("<|im_start|>assistant\n")[0] for side in (made.chosen, made.rejected)]
    assert prompts[0] == prompts[1]
    assert prompts[0].startswith("<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nword by word")
    assert len(made.chosen.tokens) < len(made.rejected.tokens) == 64
    assert learned(chatml, made.rejected) == "no, not at all, never<|im_end|>"
    assert report.truncated == 1


def test_missing_end_of_turn_is_appended_to_both_sides(endless: ChatFormat) -> None:
    with pytest.raises(InputError, match="would never stop"):
        read_pairs([pair(1, "yes", "no")], endless, POLICY)
    policy = POLICY.model_copy(update={"missing_end_of_turn": "append"})
    (made,), report = read_pairs([pair(1, "yes", "no")], endless, policy)
    assert [side.tokens[-1] for side in (made.chosen, made.rejected)] == [END, END]
    assert report.appended == 1


# Thumbs


def test_thumbs_are_labels_and_loss_is_on_the_final_answer(chatml: ChatFormat) -> None:
    long = Conversation(
        example_id="e3", messages=(user("one"), assistant("first"), user("two"), assistant("last", 0)), thumb=True
    )
    kept, report = read_thumbs([thumb(1, "yes", True), thumb(2, "no", False), long], chatml, POLICY)
    assert [example.label for example in kept] == [1.0, 0.0, 1.0]
    assert [learned(chatml, example) for example in kept] == ["yes<|im_end|>", "no<|im_end|>", "last<|im_end|>"]
    assert report.rendered == 3


def test_thumbs_that_are_all_the_same_are_refused(chatml: ChatFormat) -> None:
    with pytest.raises(InputError, match="All 2 thumbs are up; learning from thumbs needs both"):
        read_thumbs([thumb(1, "yes", True), thumb(2, "no", True)], chatml, POLICY)


def test_conversations_without_a_thumb_are_named(chatml: ChatFormat) -> None:
    with pytest.raises(InputError, match="1 examples have no thumb"):
        read_thumbs([thumb(1, "yes", True), thumb(2, "no", None)], chatml, POLICY)
