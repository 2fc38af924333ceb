import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from sklearn.metrics import f1_score, recall_score

from luthier.errors import InputError
from luthier.evaluate.bootstrap import CELLS_AT_ONCE, paired_difference
from luthier.evaluate.metrics import METRICS, metrics_of, score
from luthier.records.evaluation import Answer

LABELS = ("a", "b", "c", "d")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "red", "house", "by", "sea")
RESAMPLES = 40
SEED = 5


def answers(contestant: str, rows) -> list[Answer]:
    """Rows are (expected, text, label, log-probability, tokens)."""
    return [
        Answer(
            example_id=f"e{number}",
            contestant=contestant,
            expected=expected,
            text=text,
            label=label,
            expected_logprob=logprob,
            expected_tokens=tokens,
            prompt_tokens=1,
            completion_tokens=1,
            seconds=0.0,
        )
        for number, (expected, text, label, logprob, tokens) in enumerate(rows)
    ]


def labelled(contestant: str, accuracy: float, count: int = 120, seed: int = 0) -> list[Answer]:
    expected = np.random.default_rng(0).choice(LABELS[:3], size=count, p=[0.6, 0.3, 0.1]).tolist()
    generator = np.random.default_rng(seed)
    given = [label if generator.random() < accuracy else generator.choice([*LABELS, None]) for label in expected]
    logprobs = -generator.gamma(2.0, 3.0, size=count)
    return answers(
        contestant,
        [
            (a, str(b), b, float(p), 1 + i % 4)
            for i, (a, b, p) in enumerate(zip(expected, given, logprobs, strict=True))
        ],
    )


def written(contestant: str, noise: float, count: int = 60, seed: int = 0) -> list[Answer]:
    texts, generator = np.random.default_rng(0), np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        expected = list(texts.choice(WORDS, size=texts.integers(1, 14)))
        text = [word if generator.random() > noise else str(generator.choice(WORDS)) for word in expected]
        rows.append((" ".join(expected), " ".join(text), None, None, None))
    return answers(contestant, rows)


def macro(score_function):
    def compute(sample) -> float:
        expected = [answer.expected for answer in sample]
        given = [answer.label or "none" for answer in sample]
        return score_function(expected, given, labels=sorted(set(expected)), average="macro", zero_division=0)

    return compute


def mean_rouge_l(sample) -> float:
    scorer = RougeScorer(["rougeL"])
    return float(np.mean([scorer.score(answer.expected, answer.text)["rougeL"].fmeasure for answer in sample]))


SLOW = {
    "macro_recall": macro(recall_score),
    "macro_f1": macro(f1_score),
    "accuracy": lambda sample: np.mean([answer.label == answer.expected for answer in sample]),
    "answered": lambda sample: np.mean([answer.label is not None for answer in sample]),
    "bleu": lambda sample: corpus_bleu([a.text for a in sample], [[a.expected for a in sample]]).score / 100,
    "rouge_l": mean_rouge_l,
    "exact_match": lambda sample: np.mean([answer.text == answer.expected for answer in sample]),
    "perplexity": lambda sample: np.exp(
        -sum(answer.expected_logprob for answer in sample) / sum(answer.expected_tokens for answer in sample)
    ),
}


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_is_that_of_scoring_every_resample_anew(metric):
    task = METRICS[metric].task or "label"
    make, levels = (labelled, (0.7, 0.5)) if task == "label" else (written, (0.2, 0.5))
    better, worse = make("tuned", levels[0], seed=1), make("base", levels[1], seed=2)
    drawn = np.random.default_rng(SEED).integers(0, len(better), size=(RESAMPLES, len(better)))
    slow = [SLOW[metric]([better[i] for i in row]) - SLOW[metric]([worse[i] for i in row]) for row in drawn]

    difference = paired_difference(better, worse, metric, task, LABELS, resamples=RESAMPLES, confidence=0.9, seed=SEED)
    assert difference.value == pytest.approx(SLOW[metric](better) - SLOW[metric](worse), abs=1e-9)
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(slow, [0.05, 0.95])), abs=1e-9)
    assert (difference.contestant, difference.baseline, difference.metric) == ("tuned", "base", metric)
    assert (difference.confidence, difference.resamples) == (0.9, RESAMPLES)


def test_the_value_is_the_difference_of_the_scores():
    better, worse = labelled("tuned", 0.9), labelled("base", 0.4, seed=3)
    one, two = (score(side, "label", LABELS).metrics for side in (better, worse))
    for metric in metrics_of("label"):
        difference = paired_difference(better, worse, metric.name, "label", LABELS, resamples=10)
        assert difference.value == pytest.approx(one[metric.name] - two[metric.name], abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_answers_differ_by_nothing(metric):
    task = METRICS[metric].task or "label"
    same = labelled("base", 0.5) if task == "label" else written("base", 0.3)
    difference = paired_difference(same, same, metric, task, LABELS, resamples=100)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_a_clear_win_has_an_interval_clear_of_zero():
    difference = paired_difference(labelled("tuned", 0.95), labelled("base", 0.3, seed=1), "accuracy", "label", LABELS)
    assert 0 < difference.low < difference.value < difference.high


def test_contestants_of_equal_skill_have_an_interval_around_zero():
    difference = paired_difference(
        labelled("one", 0.6, seed=1), labelled("two", 0.6, seed=2), "macro_recall", "label", LABELS
    )
    assert difference.low < 0 < difference.high


@pytest.mark.parametrize("metric", ["macro_f1", "perplexity"])
def test_swapping_the_contestants_negates_the_difference(metric):
    one, two = labelled("one", 0.8, seed=1), labelled("two", 0.5, seed=2)
    there = paired_difference(one, two, metric, "label", LABELS, resamples=300)
    back = paired_difference(two, one, metric, "label", LABELS, resamples=300)
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low), abs=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        skilled, unskilled = (generator.random(150) < chance for chance in (0.7, 0.6))
        one, two = (
            answers(name, [("a", "", "a" if right else "b", None, None) for right in rights])
            for name, rights in (("one", skilled), ("two", unskilled))
        )
        difference = paired_difference(one, two, "accuracy", "label", LABELS, resamples=400, confidence=0.9, seed=seed)
        covered += difference.low <= 0.1 <= difference.high
    assert 0.85 <= covered / 200 <= 0.95


def test_many_resamples_are_drawn_in_blocks_without_changing_the_draws():
    better, worse = labelled("tuned", 0.7), labelled("base", 0.5, seed=2)
    resamples = CELLS_AT_ONCE // len(better) + 500
    gains = np.array([(a.label == a.expected) - (b.label == b.expected) for a, b in zip(better, worse, strict=True)])
    drawn = np.random.default_rng(SEED).integers(0, len(better), size=(resamples, len(better)))
    difference = paired_difference(better, worse, "accuracy", "label", LABELS, resamples=resamples, seed=SEED)
    wanted = np.quantile(gains[drawn].mean(axis=1), [0.025, 0.975])
    assert (difference.low, difference.high) == pytest.approx(tuple(wanted), abs=1e-12)


def test_answers_are_paired_by_example_and_not_by_place():
    better, worse = labelled("tuned", 0.9), labelled("base", 0.4, seed=3)
    straight = paired_difference(better, worse, "accuracy", "label", LABELS, resamples=100)
    assert paired_difference(better, worse[::-1], "accuracy", "label", LABELS, resamples=100) == straight


def test_answers_that_do_not_pair_up_are_refused_with_all_problems():
    better, worse = labelled("tuned", 0.9, count=4), labelled("base", 0.4, count=4)
    other = worse[1].model_copy(update={"expected": "d"})
    with pytest.raises(InputError) as caught:
        paired_difference([*better, better[0]], [worse[0], other, worse[2]], "accuracy", "label", LABELS)
    assert caught.value.problems == (
        "tuned answers one example twice",
        "e3 is answered by one of the two only",
        "e1 has two expected answers",
    )
    with pytest.raises(InputError, match="there are no answers"):
        paired_difference([], [], "accuracy", "label", LABELS)


def test_perplexity_is_compared_where_both_have_it():
    better, worse = labelled("tuned", 0.9, count=6), labelled("base", 0.4, count=6, seed=2)
    unmeasured = [answer.model_copy(update={"expected_logprob": None}) for answer in worse]
    whole = paired_difference(better[:3], worse[:3], "perplexity", "label", LABELS, resamples=50)
    assert paired_difference(better, worse[:3] + unmeasured[3:], "perplexity", "label", LABELS, resamples=50) == whole
    with pytest.raises(InputError, match="no example has log-probabilities"):
        paired_difference(better, unmeasured, "perplexity", "label", LABELS)


@pytest.mark.parametrize("options", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 95}])
def test_options_out_of_range_are_refused(options):
    same = labelled("base", 0.5, count=3)
    with pytest.raises(InputError, match="must"):
        paired_difference(same, same, "accuracy", "label", LABELS, **options)
