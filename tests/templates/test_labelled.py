"""Texts with labels: what is read, what a label may be, and how an encoder's tokens are cut."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_chat_format import assistant, user
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from luthier.errors import InputError, NotFoundError
from luthier.records.columns import Columns
from luthier.records.example import Example
from luthier.records.template import Template
from luthier.templates import column_values
from luthier.templates import labelled as labelled_module
from luthier.templates.labelled import (
    LabelledText,
    TextRenderer,
    iter_labelled,
    iter_labelled_texts,
    label_names,
    load_tokenizer,
    tokenize_labelled,
)
from luthier.templates.renderer import RenderReport

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "food", "film"]
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Make an encoder's tokenizer that, like all-MiniLM's, pads and truncates by itself."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    made.enable_truncation(3)
    made.enable_padding(length=16)
    folder = tmp_path_factory.mktemp("encoder")
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def labelled(*labels: Any, text: str = "good food") -> list[LabelledText]:
    return [LabelledText(f"e{number}", text, label) for number, label in enumerate(labels, 1)]


# Examples → texts


def test_text_is_the_template_the_column_the_users_last_message_or_the_text_field() -> None:
    fields = Example(id="e1", fields={"text": "a", "body": "b", "kind": "film"})
    chat = Example(id="e2", fields={"kind": "x"}, messages=(user("one"), assistant("yes"), user("two"), assistant("")))
    names = ["text", "body", "kind"]
    template = Template(user="{{kind}}: {{body}}")
    assert TextRenderer(template, Columns(text="text"), names).text(fields) == "film: b"
    assert TextRenderer(None, Columns(text="body"), names).text(fields) == "b"
    assert TextRenderer(None, Columns(), names).text(fields) == "a"
    assert TextRenderer(None, Columns(), names).text(chat) == "two"
    assert TextRenderer(None, Columns(text="kind"), names).text(chat) == "x"
    assert TextRenderer(None, Columns(), ["body"]).text(fields) == "b"


@pytest.mark.parametrize("value", [None, 7])
def test_example_without_text_is_named_with_the_field(value: Any) -> None:
    example = Example(id="e1", fields={"body": value, "label": "x"})
    with pytest.raises(InputError, match=r"Example e1 has .* in the field 'body'"):
        TextRenderer(None, Columns(text="body"), ["body", "label"]).text(example)


def test_unknown_column_and_unknown_field_of_the_template_are_refused() -> None:
    with pytest.raises(InputError, match="text column 'txt' is unknown"):
        TextRenderer(None, Columns(text="txt"), ["text"])
    with pytest.raises(InputError, match="user template uses fields"):
        TextRenderer(Template(user="{{txt}}"), Columns(), ["text"])


def test_labels_and_weights_come_from_their_columns() -> None:
    examples = [Example(id="e1", fields={"text": "a", "stars": 0, "w": "2"})]
    columns = Columns(label="stars", weight="w")
    renderer = TextRenderer(None, columns, ["text", "stars", "w"])
    assert list(iter_labelled_texts(examples, renderer, columns)) == [LabelledText("e1", "a", 0, 2.0)]


def test_examples_without_a_label_are_all_named() -> None:
    examples = [Example(id=f"e{n}", fields={"text": "a", "label": label}) for n, label in enumerate(["x", "", None])]
    columns = Columns(label="label")
    with pytest.raises(InputError, match="2 of 3 examples have no label in the field 'label'") as caught:
        list(iter_labelled_texts(examples, TextRenderer(None, columns, ["text", "label"]), columns))
    assert caught.value.problems == ("example e1 has no 'label'", "example e2 has no 'label'")
    with pytest.raises(InputError, match="2 of 3 examples have no label in the field 'label'"):
        label_names(examples, columns)
    with pytest.raises(InputError, match=r"No label column is named\. Did you mean 'label'"):
        iter_labelled_texts(examples, TextRenderer(None, Columns(), ["text", "label"]), Columns())
    with pytest.raises(InputError, match=r"No label column is named\. Did you mean 'label'"):
        label_names(examples, Columns())


def test_examples_of_all_parts_without_a_label_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_values, "EXAMPLES_AT_ONCE", 2)
    examples = with_labels("x", "", "y", "z", None)
    columns = Columns(label="label")
    for read in (
        lambda: label_names(examples, columns),
        lambda: list(iter_labelled_texts(examples, TextRenderer(None, columns, ["text", "label"]), columns)),
    ):
        with pytest.raises(InputError, match=r"2 values are not valid.*1 of 2 examples have no label") as caught:
            read()
        assert caught.value.problems == ("example e2 has no 'label'", "example e5 has no 'label'")


def with_labels(*labels: Any) -> list[Example]:
    return [Example(id=f"e{n}", fields={"text": "a", "label": label}) for n, label in enumerate(labels, 1)]


def test_classes_are_the_labels_that_occur_sorted_and_one_is_too_few() -> None:
    columns = Columns(label="label")
    assert label_names(iter(with_labels("pos", "neg", "pos", 3, True)), columns) == ("3", "neg", "pos", "true")
    with pytest.raises(InputError, match="two classes or more; the labels are: pos"):
        label_names(with_labels("pos", "pos"), columns)


# Texts → tokens


def test_classes_become_indexes_and_tokens_stand_between_the_special_ones(tokenizer: Tokenizer) -> None:
    kept, report = tokenize_labelled(labelled("pos", "neg", 1), tokenizer, ["neg", "pos", "1"], 16)
    assert [example.label for example in kept] == [1.0, 0.0, 2.0]
    assert kept[0].tokens == [CLS, 4, 6, SEP]
    assert kept[0].loss_mask == [False] * 4
    assert (report.rendered, report.truncated) == (3, 0)


def test_text_that_is_too_long_loses_its_end_but_not_its_special_tokens(tokenizer: Tokenizer) -> None:
    texts = labelled(1.5, text="good food bad film") + labelled(2, text="good")
    kept, report = tokenize_labelled(texts, tokenizer, None, 4)
    assert [example.tokens for example in kept] == [[CLS, 4, 6, SEP], [CLS, 4, SEP]]
    assert (report.rendered, report.truncated) == (2, 1)


def test_labels_outside_the_classes_are_all_listed(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as caught:
        tokenize_labelled(labelled("pos", "postive", "x"), tokenizer, ["neg", "positive", "pos"], 16)
    assert caught.value.problems == (
        "example e2: the label 'postive' is unknown. Did you mean 'positive'?",
        "example e3: the label 'x' is unknown. Known: 'neg', 'pos', 'positive'.",
    )


def test_targets_of_regression_are_finite_numbers(tokenizer: Tokenizer) -> None:
    kept, _ = tokenize_labelled(labelled(1, "-2.5"), tokenizer, None, 16)
    assert [example.label for example in kept] == [1.0, -2.5]
    with pytest.raises(InputError) as caught:
        tokenize_labelled(labelled("nan", "many", True, 1), tokenizer, None, 16)
    assert len(caught.value.problems) == 3
    assert "example e2: the label 'many' is not a finite number" in caught.value.problems


def test_empty_texts_are_refused_or_dropped(tokenizer: Tokenizer) -> None:
    texts = labelled("a", text=" ") + labelled("b")
    with pytest.raises(InputError, match="example e1: the text is empty"):
        tokenize_labelled(texts, tokenizer, ["a", "b"], 16)
    kept, report = tokenize_labelled(texts, tokenizer, ["a", "b"], 16, empty="drop")
    assert ([example.label for example in kept], dict(report.dropped)) == ([1.0], {"empty_text": 1})


def test_texts_are_read_one_by_one_and_what_is_wrong_with_them_is_told_at_the_end(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = RenderReport()
    texts = [*labelled("a"), *labelled("a", text=" "), *labelled("b", text="good food film"), *labelled("c", "d")]
    found = iter_labelled(iter(texts), tokenizer, ["a", "b"], 4, report, empty="drop")
    assert [next(found).label, next(found).label] == [0.0, 1.0]
    assert report == RenderReport(rendered=2, dropped=Counter(empty_text=1), truncated=1)
    monkeypatch.setattr(labelled_module, "PROBLEMS_KEPT", 1)
    with pytest.raises(InputError, match="2 texts cannot be learned from") as caught:
        next(found)
    assert caught.value.problems == ("example e1: the label 'c' is unknown. Known: 'a', 'b'.",)


def test_limit_must_leave_room_for_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="max_tokens = 2 leaves no room"):
        tokenize_labelled(labelled("a"), tokenizer, ["a"], 2)


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
