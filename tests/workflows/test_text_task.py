"""Free answers are judged as text, and a wrong guess of the task can be overruled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.records.dataset import SplitConfig
from luthier.records.template import Template
from luthier.store.store import Store
from luthier.workflows.datasets import import_dataset, split_dataset
from luthier.workflows.evaluation import EvaluateRequest, evaluate_model
from luthier.workflows.templates import save_template


@pytest.fixture
def texts(store: Store, tmp_path: Path) -> str:
    """Import questions whose answers are sentences, one of them far longer than the context, one without an answer."""
    rows = [{"q": f"What of number {i}?", "a": f"The number {i} is followed by the number {i + 1}."} for i in range(30)]
    rows += [{"q": "long " * 3000, "a": "too long"}, {"q": "nothing", "a": " "}]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    import_dataset(store, path, "texts")
    config = SplitConfig(validation=0.1, test=0.5, near_duplicate_similarity=None, seed=3)
    save_template(store, "plain", Template(user="{{q}}", assistant="{{a}}"))
    return split_dataset(store, "texts", config).reference


def test_free_answers_get_text_metrics_and_what_cannot_be_asked_is_counted(store: Store, texts: str) -> None:
    request = EvaluateRequest(base="tiny-base", dataset=texts, template="plain", few_shot=False, resamples=100)
    evaluation = evaluate_model(store, request)
    assert evaluation.task == "text"
    assert evaluation.labels == ()
    assert {"bleu", "rouge_l", "exact_match", "perplexity"} <= set(evaluation.scores["base"].metrics)
    dataset = store.datasets.get(texts)
    assert dataset.split is not None
    said = [event.message for event in store.runs.events(evaluation.id) if event.level == "warning"]
    left = dataset.split.counts["test"] - evaluation.examples
    assert (f"{left} held-out examples are too long or have no answer; left out" in said) == (left > 0)


def test_an_interrupted_evaluation_does_not_ask_again(store: Store, texts: str) -> None:
    request = EvaluateRequest(base="tiny-base", dataset=texts, template="plain", few_shot=False, resamples=100)
    evaluation = evaluate_model(store, request)
    kept = store.run_folder(evaluation.id) / "answers-base.json"
    answers = json.loads(kept.read_text())
    assert [answer["text"] for answer in answers] == [
        answer.text for answer in sorted(store.evaluations.answers(evaluation.id), key=lambda a: a.example_id)
    ]
