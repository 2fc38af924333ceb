"""Every kind of method, from a file to a registered model, on tiny models and in a real worker process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luthier.errors import InputError
from luthier.evaluate.engine.classifying import Classifier
from luthier.evaluate.engine.scoring import Scorer
from luthier.llm.base_bits import read_base_bits
from luthier.records.dataset import SplitConfig
from luthier.records.model import TunedModel
from luthier.records.training import TrainingConfig
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.workflows.datasets import import_dataset, split_dataset
from luthier.workflows.evaluation import EvaluateRequest, evaluate_model
from luthier.workflows.models import pull, served_folder
from luthier.workflows.training import TrainRequest, plan, train_model

WORDS = ("order", "message", "tweet", "model", "dog", "fox")


def pairs(count: int = 48) -> list[dict[str, Any]]:
    """Return preferences: to say the word of the question is better than to say another."""

    def message(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    return [
        {
            "input": {"messages": [message("user", f"say {WORDS[i % 6]} number {i}")]},
            "preferred_output": [message("assistant", WORDS[i % 6])],
            "non_preferred_output": [message("assistant", WORDS[(i + 1) % 6])],
        }
        for i in range(count)
    ]


def labelled(count: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"{WORDS[i % 2]} number {i}", "label": WORDS[i % 2], "value": i % 2} for i in range(count)]


def train(
    store: Store, folder: Path, rows: list[dict[str, Any]], base: str, adapter: Path | None = None, **options: Any
) -> TunedModel:
    return train_model(store, request(store, folder, rows, base, adapter, **options))


def refused(store: Store, folder: Path, rows: list[dict[str, Any]], base: str, **given: Any) -> str:
    with pytest.raises(InputError) as error:
        plan(store, request(store, folder, rows, base, **given), measure=False)
    return str(error.value)


def request(
    store: Store, folder: Path, rows: list[dict[str, Any]], base: str, adapter: Path | None = None, **options: Any
) -> TrainRequest:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    import_dataset(store, path, "data")
    config = SplitConfig(validation=0.15, test=0.15, near_duplicate_similarity=None)
    dataset = split_dataset(store, "data", config)
    fast = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32", "samples": 1}
    return TrainRequest(
        base=base,
        adapter=adapter,
        dataset=dataset.reference,
        options=TrainingConfig.model_validate({**fast, **options}),
        parity_prompts=6,
        parity_limit=0.9,
    )


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_preferences_become_a_model_that_writes(store: Store, tmp_path: Path, mode: str) -> None:
    rate = 5e-3 if mode == "lora" else 5e-4
    model = train(store, tmp_path, pairs(), "tiny-base", method="dpo", mode=mode, learning_rate=rate)
    assert model.product == "generator"
    assert model.parity is not None
    assert model.parity.passed
    assert model.training.test_metrics["reward_accuracy"] > 0.5
    assert ("adapter" in model.artifacts) == (mode == "lora")
    assert served_folder(store, model.name).is_dir()


def test_an_adapter_over_a_base_in_few_bits_is_served_as_it_was_measured(store: Store, tmp_path: Path) -> None:
    rows = [{"messages": pair["input"]["messages"] + pair["preferred_output"]} for pair in pairs()]
    model = train(store, tmp_path, rows, "tiny-base", mode="qlora", epochs=8, lora_rank=8)
    assert read_base_bits(store.models.artifact_folder(model.artifacts["adapter"])) == 4
    assert model.parity is not None
    assert {form.form: form.token_agreement for form in model.parity.forms}["merged"] == 1
    # The base's own weights are others: over them the adapter does not say what was measured.
    merged = Scorer(store.models.artifact_folder(model.artifacts["merged"]))
    chat = ChatFormat.load(served_folder(store, model.name))
    dataset = store.datasets.get(model.dataset)
    rendered = [chat.render(example.messages or ()) for example in store.datasets.examples(dataset, "validation")]
    scored = merged.score(
        [one.tokens[: one.prompt_tokens] for one in rendered],
        [[t for t, learned in zip(one.tokens, one.loss_mask, strict=True) if learned] for one in rendered],
    )
    logprobs = [logprob for answer in scored for logprob in answer.logprobs or ()]
    assert -sum(logprobs) / len(logprobs) == pytest.approx(model.training.best_valid_loss, rel=1e-4)


def test_a_reward_model_scores_and_is_not_served(store: Store, tmp_path: Path) -> None:
    model = train(store, tmp_path, pairs(), "tiny-base", method="reward")
    assert model.product == "scorer"
    assert model.parity is None
    assert set(model.training.test_metrics) >= {"loss", "reward_accuracy"}
    with pytest.raises(InputError):
        served_folder(store, model.name)
    with pytest.raises(InputError, match="writes no answers"):
        evaluate_model(store, EvaluateRequest(model=model.name))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_classifier_on_an_encoder_labels_what_its_test_measured(
    store: Store, tiny_encoder: Path, tmp_path: Path, mode: str
) -> None:
    pull(store, str(tiny_encoder))
    columns = {"label": "label", "text": "text"}
    model = train(
        store, tmp_path, labelled(), tiny_encoder.name, method="classification", mode=mode, columns=columns, epochs=8
    )
    assert model.labels == tuple(sorted(WORDS[:2]))
    assert model.training.test_metrics["accuracy"] > 0.9
    predicted = Classifier(store.models.artifact_folder(model.artifacts["merged"])).predict(["order number 7"])
    assert predicted[0].label == "order"


def test_training_goes_on_from_an_adapter_that_was_made_elsewhere(
    store: Store, tiny_base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    elsewhere = tmp_path / "elsewhere"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).save_pretrained(elsewhere)
    model = train(store, tmp_path, pairs(), "tiny-base", adapter=elsewhere, method="dpo", learning_rate=1e-3, epochs=1)
    assert (model.hyperparameters.lora_rank, model.hyperparameters.lora_alpha) == (3, 6)
    assert model.parent == str(elsewhere)
    assert model.parity is not None
    assert model.parity.passed
    before = load_file(elsewhere / "adapter_model.safetensors")
    after = load_file(store.models.artifact_folder(model.artifacts["adapter"]) / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(0 < float((after[name] - before[name]).abs().max()) < 0.5 for name in before)
    again = {"adapter": elsewhere, "method": "dpo"}
    assert "lora_rank" in refused(store, tmp_path, pairs(), "tiny-base", **again, lora_rank=4)
    (elsewhere / "adapter_config.json").write_text(json.dumps(config.to_dict() | {"peft_type": "IA3"}, default=str))
    assert "peft_type='IA3'" in refused(store, tmp_path, pairs(), "tiny-base", **again)
    (elsewhere / "adapter_config.json").write_text(json.dumps(config.to_dict(), default=list))
    (elsewhere / "adapter_model.safetensors").rename(elsewhere / "adapter_model.bin")
    assert "no adapter_model.safetensors" in refused(store, tmp_path, pairs(), "tiny-base", **again)
    again["adapter"] = tmp_path / "nothing"
    assert "does not say which rank" in refused(store, tmp_path, pairs(), "tiny-base", **again)


def test_a_classifier_goes_on_with_its_own_labels(store: Store, tiny_encoder: Path, tmp_path: Path) -> None:
    pull(store, str(tiny_encoder))
    classify = {"method": "classification", "columns": {"label": "label", "text": "text"}, "epochs": 1}
    first = train(store, tmp_path, labelled(), tiny_encoder.name, **classify)
    others = [{**row, "label": "dog"} if row["label"] == WORDS[0] else row for row in labelled()]
    assert "the label 'dog' is unknown" in refused(store, tmp_path, others, first.name, **classify)
    regress = {**classify, "method": "regression"}
    assert "was trained by classification" in refused(store, tmp_path, labelled(), first.name, **regress)
    fewer = [row for row in labelled() if row["label"] == WORDS[0]]  # a class that does not occur keeps its place
    assert train(store, tmp_path, fewer, first.name, **classify).labels == first.labels


def test_training_goes_on_from_a_tuned_model(store: Store, tmp_path: Path) -> None:
    first = train(store, tmp_path, pairs(), "tiny-base", method="dpo", learning_rate=5e-3)
    second = train(store, tmp_path, pairs(), first.name, method="dpo", learning_rate=1e-3, epochs=1)
    assert second.base == first.base
    assert second.parent == first.name
    given = {"method": "dpo", "mode": "dora", "lora_rank": 4}
    assert "mode=dora, lora_rank" in refused(store, tmp_path, pairs(), first.name, **given)
    assert second.training.steps < first.training.steps
