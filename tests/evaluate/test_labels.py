import pytest

from luthier.evaluate.labels import label_named, label_set, read_label, task_of

TONES = ("very negative", "negative", "neutral", "positive")
INTENTS = ("card_arrival", "card", "lost_or_stolen_card", "transfer")


@pytest.mark.parametrize(
    "text",
    [
        "positive",
        " Positive.\n",
        '"POSITIVE"',
        "**Positive**",
        "The sentiment is: positive!",
        "Positive, because the writer is happy. So: positive",
        "“positive”",
        "label=positive",
    ],
)
def test_a_label_is_read_from_chatty_answers(text):
    assert read_label(text, TONES) == "positive"


@pytest.mark.parametrize("text", ["", "…", "I cannot say.", "It is positively great", "nonnegative", "unneutral_ized"])
def test_no_label_is_read_where_none_stands_as_a_word(text):
    assert read_label(text, TONES) is None


@pytest.mark.parametrize("text", ["positive or negative", "Neutral? No, positive.", "negative, even very negative"])
def test_several_different_labels_are_ambiguous(text):
    assert read_label(text, TONES) is None


def test_the_longest_of_nested_labels_wins():
    assert read_label("I would call it very negative.", TONES) == "very negative"
    assert read_label("This is about card arrival", INTENTS) == "card_arrival"
    assert read_label("The card-arrival intent", INTENTS) == "card_arrival"
    assert read_label("lost or stolen card", INTENTS) == "lost_or_stolen_card"
    assert read_label("the card", INTENTS) == "card"


def test_labels_that_overlap_without_nesting_are_ambiguous():
    assert read_label("the card arrival time", ("card arrival", "arrival time")) is None


@pytest.mark.parametrize(
    ("labels", "text", "label"),
    [
        (("C", "C++"), "It is C++, of course", "C++"),
        (("C", "C++"), "It is C.", "C"),
        (("-1", "0"), "1", None),
        (("-1", "0", "1"), "The answer is -1.", "-1"),
        ((">50K", "<=50K"), "They earn <=50k", "<=50K"),
        (("★", "★★"), "★★", "★★"),
        (("😀", "😢"), "Surely 😢!", "😢"),
        (("a", "A"), "A", "A"),
    ],
)
def test_signs_that_make_the_meaning_of_a_label_are_kept(labels, text, label):
    assert read_label(text, labels) == label


@pytest.mark.parametrize(
    ("labels", "text", "label"),
    [
        (("满意", "不满意"), "答案是不满意。", "不满意"),
        (("긍정", "부정"), "긍정입니다", "긍정"),
        (("Größe", "Farbe"), "Es geht um die GRÖSSE", "Größe"),
        (("été", "hiver"), "C'est l'e\u0301te\u0301.", "été"),
    ],
)
def test_labels_of_other_scripts_and_unicode_forms_are_read(labels, text, label):
    assert read_label(text, labels) == label


def test_a_label_with_a_question_mark_is_read_with_and_without_it():
    labels = ("reverted_card_payment?", "top_up_failed")
    assert read_label("reverted card payment", labels) == "reverted_card_payment?"
    assert read_label("reverted_card_payment?", labels) == "reverted_card_payment?"


def test_label_named_takes_the_whole_text_only():
    assert label_named(" Negative.", TONES) == "negative"
    assert label_named("it is negative", TONES) is None


def test_no_labels_read_nothing():
    assert read_label("positive", ()) is None


def test_label_set_joins_spellings_that_differ_in_case_and_space():
    answers = ["Positive", "positive", "positive ", "Very  bad", "very bad", " "]
    assert label_set(answers[:2], answers[2:]) == ("Very  bad", "positive")


def test_few_repeated_short_answers_are_a_label_task():
    assert task_of(["yes", "no"], ["yes", "no", "no", "yes"]) == "label"
    intents = [f"intent_number_{i}" for i in range(77)]
    assert task_of(intents, intents * 3) == "label"


@pytest.mark.parametrize(
    "answers",
    [
        ["always the same"] * 30,
        [f"answer {i}" for i in range(30)],
        [f"class {i}" for i in range(101)] * 5,
        ["one two three four five six", "no"] * 10,
        ["x" * 61, "no"] * 10,
        [],
    ],
    ids=["one answer", "unrepeated", "too many", "too many words", "too long", "none"],
)
def test_other_answers_are_a_text_task(answers):
    assert task_of(answers[:5], answers[5:]) == "text"
