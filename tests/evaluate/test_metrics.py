import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from luthier.errors import InputError
from luthier.evaluate.metrics import METRICS, NO_LABEL, metric_named, metrics_of, score, value_of
from luthier.records.evaluation import Answer

LABELS = ("a", "b", "c", "never expected")
HYPOTHESES = ["The cat sat on the mat .", "a dog", "", "Yes, it does rain in Spain.", "hello there world of men"]
REFERENCES = [
    "The cat is on the mat.",
    "A dog",
    "nothing",
    "It does rain in Spain, mostly.",
    "hello there, world of men",
]


def answer(number: int, text: str = "", expected: str = "x", **fields) -> Answer:
    base = {"prompt_tokens": 10, "completion_tokens": 2, "seconds": 0.5}
    return Answer(example_id=str(number), contestant="base", text=text, expected=expected, **(base | fields))


def labelled(pairs) -> list[Answer]:
    return [answer(i, text=str(given), expected=expected, label=given) for i, (expected, given) in enumerate(pairs)]


def texts(hypotheses=HYPOTHESES, references=REFERENCES) -> list[Answer]:
    return [answer(i, *pair) for i, pair in enumerate(zip(hypotheses, references, strict=True))]


def random_labels(seed: int, count: int = 200) -> list[Answer]:
    generator = np.random.default_rng(seed)
    expected = generator.choice(["a", "b", "c"], size=count, p=[0.7, 0.2, 0.1])
    given = generator.choice([*LABELS, None], size=count)
    return labelled(zip(expected.tolist(), given.tolist(), strict=True))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("seed", range(5))
def test_label_scores_are_those_of_scikit_learn(seed):
    answers = random_labels(seed)
    expected = [answer.expected for answer in answers]
    given = [answer.label or "none" for answer in answers]
    wanted = {
        "macro_recall": f"{balanced_accuracy_score(expected, given):.12f}",
        "accuracy": f"{accuracy_score(expected, given):.12f}",
        "macro_f1": f"{f1_score(expected, given, labels=['a', 'b', 'c'], average='macro'):.12f}",
        "answered": f"{sum(label != 'none' for label in given) / len(given):.12f}",
    }
    scores = score(answers, "label", LABELS)
    assert {name: f"{value:.12f}" for name, value in scores.metrics.items()} == wanted
    assert {name: f"{value_of(METRICS[name], answers, LABELS):.12f}" for name in wanted} == wanted


def test_no_label_is_a_wrong_answer_and_shows_in_the_confusion():
    scores = score(labelled([("a", "a"), ("a", None), ("b", "a"), ("b", "b")]), "label", LABELS)
    assert scores.metrics == {
        "macro_recall": 0.5,
        "accuracy": 0.5,
        "macro_f1": pytest.approx(0.58333333),
        "answered": 0.75,
    }
    assert scores.confusion == {"a": {"a": 1, NO_LABEL: 1}, "b": {"a": 1, "b": 1}}


def test_an_expected_answer_may_spell_its_label_differently():
    answers = [answer(0, expected=" A. ", label="a"), answer(1, expected="b", label="c")]
    assert score(answers, "label", LABELS).metrics["accuracy"] == 0.5


def test_expected_answers_and_labels_outside_the_label_set_are_refused():
    with pytest.raises(InputError) as caught:
        score(labelled([("z", "a"), ("a", "a"), ("b", "y")]), "label", LABELS)
    assert caught.value.problems == ("'z'", "'y'")


def test_bleu_is_that_of_sacrebleu():
    bleu = corpus_bleu(HYPOTHESES, [REFERENCES]).score / 100
    assert bleu > 0.1
    assert score(texts(), "text").metrics["bleu"] == pytest.approx(bleu, abs=1e-12)


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        (["no match at all here"], ["something else entirely today"]),
        (["one two six seven eight"], ["one two three four five"]),
        (["too short"], ["too short"]),
        ([""], ["a reference"]),
        (["a b c d"], ["a b c d e f g h i j k l"]),
        (["a b c d e f g h i j"], ["a b c d"]),
        (["ünïcode is a föreign thing, no?"], ["ünïcode is a föreign thing, yes?"]),
    ],
)
def test_bleu_is_that_of_sacrebleu_at_the_edges(hypotheses, references):
    bleu = corpus_bleu(hypotheses, [references]).score / 100
    assert value_of(METRICS["bleu"], texts(hypotheses, references)) == pytest.approx(bleu, abs=1e-12)


def test_rouge_l_is_that_of_rouge_score():
    scorer = RougeScorer(["rougeL"])
    pairs = zip(REFERENCES, HYPOTHESES, strict=True)
    wanted = np.mean([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])
    assert score(texts(), "text").metrics["rouge_l"] == pytest.approx(wanted, abs=1e-12)


def test_rouge_l_reads_words_beyond_ascii():
    assert value_of(METRICS["rouge_l"], texts(["Καλημέρα κόσμε"], ["καλημέρα, κόσμε!"])) == 1.0


def test_exact_match_folds_white_space_only():
    answers = texts([" a  b\n", "A b", "a b."], ["a b", "a b", "a b"])
    assert score(answers, "text").metrics["exact_match"] == pytest.approx(1 / 3)


def test_perplexity_is_over_the_tokens_of_the_answers_that_have_it():
    answers = [
        answer(0, expected_logprob=-2.0, expected_tokens=4),
        answer(1, expected_logprob=-10.0, expected_tokens=2),
        answer(2),
    ]
    assert score(answers, "text").metrics["perplexity"] == pytest.approx(math.exp(12 / 6))


def test_perplexity_is_left_out_where_it_was_not_measured():
    assert "perplexity" not in score(texts(), "text").metrics
    assert math.isnan(value_of(METRICS["perplexity"], texts()))


def test_scores_carry_means_of_tokens_and_seconds():
    scores = score([answer(0), answer(1, prompt_tokens=20, completion_tokens=4, seconds=1.5)], "text")
    assert (scores.contestant, scores.examples, scores.confusion) == ("base", 2, None)
    assert (scores.prompt_tokens_per_request, scores.completion_tokens_per_request) == (15, 3)
    assert scores.seconds_per_request == 1.0


def test_scores_of_nobody_and_of_two_contestants_are_refused():
    with pytest.raises(InputError, match="none"):
        score([], "text")
    with pytest.raises(InputError, match=r"\['base', 'tuned'\]"):
        score([answer(0), answer(1).model_copy(update={"contestant": "tuned"})], "text")


def test_a_metric_is_found_by_name_and_task_and_else_suggested():
    assert [metric.name for metric in metrics_of("text")] == ["bleu", "rouge_l", "exact_match", "perplexity"]
    assert metric_named("accuracy", "label").name == "accuracy"
    with pytest.raises(InputError, match="Did you mean 'macro_recall'"):
        metric_named("macro_recal", "label")
    with pytest.raises(InputError, match="no metric of text tasks"):
        metric_named("accuracy", "text")
