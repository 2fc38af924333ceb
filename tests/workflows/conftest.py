"""A home with the tiny base model pulled, and one whole way through it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier.records.dataset import DatasetVersion, SplitConfig
from luthier.records.evaluation import Evaluation
from luthier.records.model import TunedModel
from luthier.records.template import Template, TemplateVersion
from luthier.records.training import TrainingConfig
from luthier.store.store import Store
from luthier.workflows.datasets import import_dataset, split_dataset
from luthier.workflows.evaluation import EvaluateRequest, evaluate_model
from luthier.workflows.models import pull
from luthier.workflows.templates import save_template
from luthier.workflows.training import TrainRequest, train_model

WORDS = ["order", "message", "tweet", "model", "dog", "fox", "morning", "world", "number", "sentiment"]
OPTIONS = TrainingConfig(epochs=8, batch_size=8, learning_rate=1e-2, lora_rank=8, precision="float32")


@dataclass(frozen=True)
class Way:
    """What one way through the spine left behind."""

    store: Store
    dataset: DatasetVersion
    template: TemplateVersion
    model: TunedModel
    evaluation: Evaluation


def write_questions(path: Path, count: int = 120) -> Path:
    """Write a CSV whose label is decided by its first word."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for index in range(count):
            word, other = WORDS[index % 10], WORDS[(index * 7 + index // 10) % 10]
            opening = "please help me with" if index % 2 else "thank you for"
            writer.writerow([f"{opening} my {word} and the {other} {index}", "yes" if index % 2 else "no"])
    return path


def make_store(home: Path, tiny_base: Path) -> Store:
    """Make a home with the tiny base model in it."""
    store = Store(home)
    pull(store, str(tiny_base))
    return store


def make_dataset(store: Store, folder: Path) -> tuple[DatasetVersion, TemplateVersion]:
    """Import and divide the questions, and save a template for them."""
    import_dataset(store, write_questions(folder / "questions.csv"), "questions")
    dataset = split_dataset(
        store,
        "questions",
        SplitConfig(validation=0.1, test=0.4, label="label", near_duplicate_similarity=None),
    )
    template = save_template(store, "answer", Template(system="Answer.", user="{{text}}", assistant="{{label}}"))
    return dataset, template


@pytest.fixture
def store(tmp_path: Path, tiny_base: Path) -> Store:
    return make_store(tmp_path / "home", tiny_base)


@pytest.fixture(scope="session")
def way(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Way:
    """Go the whole way once: import, train in a process, evaluate in a process."""
    folder = tmp_path_factory.mktemp("way")
    store = make_store(folder / "home", tiny_base)
    dataset, template = make_dataset(store, folder)
    request = TrainRequest(
        base="tiny-base",
        dataset=dataset.reference,
        template=template.reference,
        suffix="spine",
        options=OPTIONS,
        parity_prompts=50,
        parity_limit=0.95,
    )
    model = train_model(store, request)
    evaluation = evaluate_model(store, EvaluateRequest(model=model.name, validation_examples=8, resamples=200))
    return Way(store, dataset, template, model, evaluation)
