"""Tuned classifiers: the same numbers as plain transformers gives, whatever the batch; and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

from luthier.errors import InputError, NotFoundError
from luthier.evaluate.engine.classifying import Classifier
from luthier.evaluate.metrics import score
from luthier.evaluate.predictions import Prediction, as_answers, score_numbers
from luthier.templates.labelled import LabelledText, load_tokenizer

LABELS = ("negative", "neutral", "positive")
TEXTS = [
    "good morning, how are you today?",
    "yes",
    "The quick brown fox jumps over the lazy dog while the sentiment of the tweet is positive.",
    "Please help me with my order. " * 12,
    "no",
]


def with_head(base: Path, folder: Path, labels: tuple[str, ...] | None = LABELS, **config: Any) -> Path:
    """Write a base with a random head, as training writes a classifier (None: a number)."""
    torch.manual_seed(1)
    names = dict(enumerate(labels or ("score",)))
    settings: dict[str, Any] = {
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": "single_label_classification" if labels else "regression",
    }
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names), **(settings | config))
    for head in ("score", "classifier"):  # a head with opinions: near zero, any mistake would look right
        if hasattr(model, head):
            torch.nn.init.normal_(getattr(model, head).weight, std=0.3)
    model.save_pretrained(folder)
    shutil.copy(base / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module", params=["tiny_encoder", "tiny_base"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(request.getfixturevalue(request.param), tmp_path_factory.mktemp("classifier") / "model")


def alone(folder: Path, tokens: list[int]) -> list[float]:
    """Return what transformers gives for one text by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return list(model(torch.tensor([tokens])).logits[0].tolist())


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_predictions_are_those_of_transformers_whatever_the_batch(folder: Path, batch_tokens: int) -> None:
    found = Classifier(folder).predict(TEXTS, batch_tokens)
    tokenizer = load_tokenizer(folder)
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert len({round(prediction.score, 4) for prediction in found}) == len(TEXTS)
    for text, prediction in zip(TEXTS, found, strict=True):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        encoding.truncate(context - tokenizer.num_special_tokens_to_add(is_pair=False))
        tokens = tokenizer.post_process(encoding).ids
        expected = torch.tensor(alone(folder, tokens)).softmax(-1).tolist()
        assert list(prediction.probabilities) == list(LABELS)
        assert list(prediction.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert prediction.score == max(prediction.probabilities.values())
        assert prediction.probabilities[str(prediction.label)] == prediction.score
        assert prediction.tokens == len(tokens)


def test_a_text_that_ends_in_the_padding_token_is_read_to_its_end(tiny_base: Path, tmp_path: Path) -> None:
    folder = with_head(tiny_base, tmp_path / "model")
    text = "yes<|endoftext|>"
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokens[-1] == json.loads((folder / "config.json").read_text())["pad_token_id"]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.score(model.model(torch.tensor([tokens])).last_hidden_state[0, -1]).softmax(-1).tolist()
    for texts in ([text], [text, "good morning, how are you today?"]):
        assert list(Classifier(folder).predict(texts)[0].probabilities.values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("fixture", ["tiny_encoder", "tiny_base"])
def test_a_model_of_one_output_gives_a_number(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = with_head(request.getfixturevalue(fixture), tmp_path / "model", None)
    classifier = Classifier(folder)
    first, second = classifier.predict(TEXTS[:2])
    assert classifier.labels == ()
    assert (first.label, first.probabilities) == (None, {})
    assert first.score == pytest.approx(alone(folder, load_tokenizer(folder).encode(TEXTS[0]).ids)[0], abs=1e-5)
    assert first.score != pytest.approx(second.score)


def test_texts_longer_than_in_training_lose_their_end(folder: Path) -> None:
    short = Classifier(folder, max_tokens=6)
    long, cut = short.predict(["yes no maybe hello world good morning", "yes no maybe hello world good morning " * 5])
    assert long.tokens == cut.tokens == 6
    assert long.probabilities == pytest.approx(cut.probabilities)


def test_in_bfloat16_probabilities_stay_close(folder: Path) -> None:
    exact, rounded = Classifier(folder).predict(TEXTS), Classifier(folder, precision="bfloat16").predict(TEXTS)
    for one, other in zip(exact, rounded, strict=True):
        assert other.probabilities == pytest.approx(one.probabilities, abs=0.15)


def test_no_texts_give_no_predictions_and_empty_ones_are_all_named(folder: Path) -> None:
    classifier = Classifier(folder)
    assert classifier.predict([]) == []
    with pytest.raises(InputError) as caught:
        classifier.predict(["yes", " ", "no", ""])
    assert caught.value.problems == ("text 2 is empty", "text 4 is empty")


def test_what_is_no_trained_classifier_is_refused(tiny_encoder: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no trained classification head: classifier\.bias, classifier\.weight"):
        Classifier(tiny_encoder)
    with pytest.raises(InputError, match=r"no trained classification head: score\.weight"):
        Classifier(tiny_base)
    several = with_head(tiny_encoder, tmp_path / "several", problem_type="multi_label_classification")
    with pytest.raises(InputError, match="several labels at once"):
        Classifier(several)
    (several / "model.safetensors").rename(several / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \.safetensors"):
        Classifier(several)
    (several / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        Classifier(several)


def test_predictions_are_scored_as_answers() -> None:
    texts = [LabelledText(f"e{n}", "a text", label) for n, label in enumerate(["yes", "no", "no", 1])]
    given = [Prediction(label, 0.9, {label: 0.9}, tokens=4) for label in ("yes", "no", "yes", "1")]
    answers = as_answers(given, texts, "tuned", seconds=2.0)
    scores = score(answers, "label", ("1", "no", "yes"))
    assert scores.metrics["accuracy"] == 0.75
    assert scores.metrics["macro_recall"] == pytest.approx(2.5 / 3)
    assert scores.metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert scores.confusion == {"1": {"1": 1}, "no": {"no": 1, "yes": 1}, "yes": {"yes": 1}}
    assert (scores.seconds_per_request, scores.prompt_tokens_per_request) == (0.5, 4)
    number = as_answers([Prediction(None, 1.5)], [LabelledText("e1", "a text", 2)], "tuned")[0]
    assert (number.text, number.expected, number.label) == ("1.5", "2", None)


def test_numbers_are_scored_by_their_errors() -> None:
    given = [Prediction(None, score) for score in (1.0, 2.0, 6.0)]
    scores = score_numbers(given, [1.0, 3.0, 5.0])
    assert scores["mean_absolute_error"] == pytest.approx(2 / 3)
    assert scores["root_mean_squared_error"] == pytest.approx(math.sqrt(2 / 3))
    assert scores["r_squared"] == pytest.approx(1 - 2 / 8)
    assert "r_squared" not in score_numbers(given, [2.0, 2.0, 2.0])
    with pytest.raises(InputError, match="no predictions"):
        score_numbers([], [])
