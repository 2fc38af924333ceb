"""The registry holds finished models only, and notices when a file of theirs has changed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from luthier.errors import IntegrityError, NotFoundError
from luthier.records.base_model import BaseModelInfo
from luthier.records.evaluation import Answer, Evaluation
from luthier.records.model import Artifact, TunedModel, tuned_name
from luthier.records.template import Template, TemplateVersion
from luthier.records.training import Resolved, TrainingResult
from luthier.store.store import Store

BASE = BaseModelInfo(
    id="tiny",
    source="folder:/models/tiny",
    licence="Apache-2.0",
    architecture="LlamaForCausalLM",
    parameters=1_000,
    context_length=256,
    chat_format="chatml",
    sha256="0" * 64,
    folder="bases/tiny",
    pulled_at=datetime(2026, 1, 1, tzinfo=UTC),
)
RESOLVED = Resolved(
    epochs=1,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=0,
    schedule="cosine",
    lora_rank=8,
    lora_alpha=16,
    lora_dropout=0,
    weight_decay=0,
    max_gradient_norm=1,
    max_tokens=256,
    tokens_per_row=512,
    validate_every=10,
    checkpoint_every=10,
    precision="float32",
    seed=0,
)
TRAINING = TrainingResult(
    steps=10,
    best_step=10,
    train_loss=0.5,
    valid_loss=None,
    best_valid_loss=None,
    trained_tokens=100,
    seconds=1.5,
    tokens_per_second=66.7,
    peak_memory_bytes=1_000,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def tuned(run_id: str, day: int = 1, artifacts: dict[str, Artifact] | None = None) -> TunedModel:
    template = TemplateVersion(name="judge", version=1, template=Template(user="{{text}}", assistant="{{label}}"))
    return TunedModel(
        name=tuned_name("tiny", "local", "sentiment", run_id),
        base="tiny",
        base_sha256=BASE.sha256,
        run_id=run_id,
        dataset="tweets@2",
        dataset_hash="1" * 64,
        template=template,
        hyperparameters=RESOLVED,
        options={"epochs": "auto"},
        seed=0,
        code_version="0.1.0",
        training=TRAINING,
        parity=None,
        artifacts=artifacts or {},
        licence="Apache-2.0",
        created_at=datetime(2026, 1, day, tzinfo=UTC),
    )


def write_weights(content: bytes = b"weights") -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(content)
        (folder / "adapter_config.json").write_text("{}")

    return fill


# Base models


def test_base_model_is_found_by_its_id_after_reopening(store: Store) -> None:
    store.models.add_base(BASE)
    store.close()
    reopened = Store(store.home)
    assert reopened.models.base("tiny") == BASE
    assert reopened.models.base_folder(BASE) == reopened.artifacts.path("bases/tiny")


def test_base_model_recorded_again_replaces_the_earlier_record(store: Store) -> None:
    store.models.add_base(BASE)
    newer = BASE.model_copy(update={"sha256": "2" * 64})
    store.models.add_base(newer)
    assert store.models.bases() == [newer]


def test_base_model_that_was_not_pulled_is_not_found_with_the_command_that_pulls_it(store: Store) -> None:
    store.models.add_base(BASE)
    with pytest.raises(NotFoundError, match="Did you mean 'tiny'") as caught:
        store.models.base("tinny")
    assert caught.value.hint == "luthier model pull tinny"


# Forms of a model


def test_form_is_recorded_with_its_bytes_and_the_hash_of_each_file(store: Store) -> None:
    artifact = store.models.add_artifact("ft:tiny:local:s:1", "adapter", write_weights())
    assert artifact.bytes == 9
    assert sorted(artifact.sha256) == ["adapter_config.json", "adapter_model.safetensors"]
    assert store.models.artifact_folder(artifact, check=True).is_relative_to(store.home)


def test_form_that_is_there_already_is_kept_and_not_made_again(store: Store) -> None:
    first = store.models.add_artifact("ft:tiny:local:s:1", "adapter", write_weights(b"first"))
    assert store.models.add_artifact("ft:tiny:local:s:1", "adapter", write_weights(b"second")) == first
    other = store.models.add_artifact("ft:tiny:local:s:1", "merged", write_weights(b"second"))
    assert other.path != first.path


def test_form_whose_making_fails_is_not_there_and_can_be_made_again(store: Store) -> None:
    def fail(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.models.add_artifact("ft:tiny:local:s:1", "adapter", fail)
    artifact = store.models.add_artifact("ft:tiny:local:s:1", "adapter", write_weights())
    assert store.models.artifact_folder(artifact, check=True).is_dir()


def test_changed_or_missing_file_of_a_form_is_noticed(store: Store) -> None:
    artifact = store.models.add_artifact("ft:tiny:local:s:1", "adapter", write_weights())
    folder = store.models.artifact_folder(artifact)
    (folder / "adapter_model.safetensors").write_bytes(b"w3ights")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(IntegrityError) as caught:
        store.models.artifact_folder(artifact, check=True)
    assert caught.value.problems == ("adapter_config.json is missing", "adapter_model.safetensors has changed")


def test_model_name_never_leaves_the_artifact_folder(store: Store) -> None:
    artifact = store.models.add_artifact("ft:../../tiny:local:../s:1", "adapter", write_weights())
    assert store.models.artifact_folder(artifact).is_relative_to(store.artifacts.root / "models")


# The registry


def test_model_comes_back_with_all_that_reproduces_it(store: Store) -> None:
    artifact = store.models.add_artifact("ft:tiny:local:sentiment:abc", "adapter", write_weights())
    model = tuned("train-260101-abc", artifacts={"adapter": artifact})
    store.models.add(model)
    store.close()
    assert Store(store.home).models.get("ft:tiny:local:sentiment:abc") == model


def test_model_is_found_by_the_id_at_the_end_of_its_name_where_that_is_unique(store: Store) -> None:
    store.models.add(tuned("train-260101-abc"))
    store.models.add(tuned("train-260101-def"))
    assert store.models.get("def").run_id == "train-260101-def"
    assert store.models.get("sentiment:abc").run_id == "train-260101-abc"
    store.models.add(tuned("again-abc").model_copy(update={"name": "ft:tiny:local:other:abc"}))
    with pytest.raises(NotFoundError):
        store.models.get("abc")


def test_unknown_model_is_not_found_with_a_suggestion(store: Store) -> None:
    store.models.add(tuned("train-260101-abc"))
    with pytest.raises(NotFoundError, match="Did you mean 'ft:tiny:local:sentiment:abc'"):
        store.models.get("ft:tiny:local:sentimnt:abc")


def test_model_of_the_same_run_is_replaced(store: Store) -> None:
    store.models.add(tuned("train-260101-abc"))
    again = tuned("train-260101-abc").model_copy(update={"seed": 7})
    store.models.add(again)
    assert store.models.all() == [again]


def test_model_gets_a_further_form(store: Store) -> None:
    model = tuned("train-260101-abc")
    store.models.add(model)
    artifact = store.models.add_artifact(model.name, "gguf-f16", write_weights())
    more = model.model_copy(update={"artifacts": {"gguf-f16": artifact}})
    store.models.update(more)
    assert store.models.get("abc") == more


def test_models_are_listed_with_the_newest_first(store: Store) -> None:
    for day in (2, 3, 1):
        store.models.add(tuned(f"train-26010{day}-{day}", day))
    assert [model.created_at.day for model in store.models.all()] == [3, 2, 1]


# Evaluations of a model


def evaluation(number: int, model: str | None) -> Evaluation:
    return Evaluation(
        id=f"evaluate-{number}",
        task="label",
        metric="macro_recall",
        dataset="tweets@2",
        dataset_hash="1" * 64,
        template="judge@1",
        base="tiny",
        model=model,
        examples=2,
        scores={},
        seconds=1.5,
        created_at=datetime(2026, 1, number, tzinfo=UTC),
    )


def answer(example: str, contestant: str, text: str) -> Answer:
    return Answer(
        example_id=example,
        contestant=contestant,
        text=text,
        expected="positive",
        prompt_tokens=9,
        completion_tokens=1,
        seconds=0.1,
    )


def test_evaluation_keeps_every_answer_of_every_contestant_and_is_replaced_as_a_whole(store: Store) -> None:
    answers = [answer(example, contestant, "yes") for example in ("e1", "e2") for contestant in ("base", "tuned")]
    store.evaluations.add(evaluation(1, "ft:a"), answers)
    assert store.evaluations.answers("evaluate-1") == answers
    store.evaluations.add(evaluation(1, "ft:a"), answers[:1])
    assert store.evaluations.answers("evaluate-1") == answers[:1]
    assert store.evaluations.get("evaluate-1") == evaluation(1, "ft:a")


def test_evaluation_without_answers_is_saved(store: Store) -> None:
    store.evaluations.add(evaluation(1, None), [])
    assert store.evaluations.answers("evaluate-1") == []


def test_evaluations_are_listed_with_the_newest_first_and_by_model(store: Store) -> None:
    for number, model in enumerate(("ft:a", "ft:b", "ft:a"), 1):
        store.evaluations.add(evaluation(number, model), [])
    assert [found.id for found in store.evaluations.all()] == ["evaluate-3", "evaluate-2", "evaluate-1"]
    assert [found.id for found in store.evaluations.all("ft:a")] == ["evaluate-3", "evaluate-1"]
    with pytest.raises(NotFoundError, match="evaluate-9"):
        store.evaluations.get("evaluate-9")
