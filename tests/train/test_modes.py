"""Every mode changes what it should and nothing else, and what it leaves behind gives the trained numbers elsewhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_exactness import perturb
from test_methods import METHODS, make_job, run, units
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from luthier.errors import InputError
from luthier.llm.base_bits import read_base_bits
from luthier.llm.base_config import read_adapter
from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.merging import save_merged, save_whole
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import load_with_adapter
from luthier.llm.rows import pack
from luthier.records.objectives import product
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine import trainable
from luthier.train.engine.checkpoint import BEST, save_best
from luthier.train.engine.loop import TrainingJob, best_adapter
from luthier.train.engine.trainable import load_trainable

MODES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"mode": "rslora"},
    "dora": {"mode": "dora"},
    "qlora-4": {"mode": "qlora"},
    "qlora-8": {"mode": "qlora", "base_bits": 8},
    "full": {"mode": "full", "learning_rate": 3e-3},
    "last_layers": {"mode": "last_layers", "last_layers": 1, "learning_rate": 3e-3},
}
ADAPTERS = [mode for mode in MODES if mode not in ("full", "last_layers")]
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "electra": {"embedding_size": 32},
    "mpnet": {},
    "deberta-v2": {},
    "modernbert": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
}
SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def plain_loss(model: Any, examples: list[TokenizedExample]) -> float:
    """Return the mean loss of the last tokens, by transformers or PEFT alone."""
    with torch.no_grad():
        losses = [
            -model(input_ids=torch.tensor([one.tokens])).logits[0, -2].log_softmax(-1)[one.tokens[-1]]
            for one in examples
        ]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_learns_and_leaves_what_plain_libraries_load(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    job = make_job(tiny_base, tmp_path, validations=6, **MODES[mode])
    seen, _, result = run(job)
    assert result is not None
    assert result.best_valid_loss is not None
    first = next(metrics.valid_loss for metrics in seen if metrics.valid_loss is not None)
    assert result.best_valid_loss < 0.5 * first
    if mode.startswith("qlora"):  # the adapter belongs to the base as its bits have it, and so does what is exported
        save_merged(tiny_base, best_adapter(job), tmp_path / "merged")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    elif mode in ADAPTERS:
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(best_adapter(job))).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(best_adapter(job), dtype=torch.float32)
    measured = plain_loss(model, units(8, "supervised", first=40))
    assert measured == pytest.approx(result.best_valid_loss, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mode", ["lora", "rslora", "dora"])
def test_products_in_integers_teach_what_exact_ones_do(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    options = {**MODES[mode], "validations": 6}
    exact, rounded = (make_job(tiny_base, tmp_path / p, **options, precision=p) for p in ("float32", "int8"))
    losses = []
    for job in (exact, rounded):
        _, _, result = run(job)
        assert result is not None
        assert read_base_bits(best_adapter(job)) is None  # it belongs to the base as it is
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(best_adapter(job))).eval()
        losses.append(plain_loss(model, units(8, "supervised", first=40)))
        assert losses[-1] == pytest.approx(result.best_valid_loss, rel=0.02, abs=0.002)
    assert losses[1] == pytest.approx(losses[0], rel=0.02, abs=0.002)


def test_a_base_without_linear_layers_is_not_multiplied_in_integers(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=120, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    job = make_job(tmp_path / "base", tmp_path, precision="int8")
    with pytest.raises(InputError, match="no linear layers to hold in few bits") as refused:
        trained_model(job)
    assert refused.value.hint == "precision=auto"


def test_a_run_in_integers_does_not_go_on_where_they_are_not_exact(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_base, tmp_path, precision="int8")
    monkeypatch.setattr(trainable, "has_exact_integers", lambda here: False)
    with pytest.raises(InputError, match="precision=int8 is for processors"):
        trained_model(job)


def test_an_adapter_over_few_bits_keeps_them_where_training_goes_on_in_integers(
    tiny_base: Path, tmp_path: Path
) -> None:
    first = make_job(tiny_base, tmp_path / "first", epochs=1, **MODES["qlora-8"])
    run(first)
    shape = read_adapter(best_adapter(first))
    again = make_job(tiny_base, tmp_path / "again", epochs=1, precision="int8", lora_rank=shape.rank)
    again = replace(again, start_adapter=best_adapter(first))
    run(again)
    assert read_base_bits(best_adapter(again)) == 8


@pytest.mark.parametrize("mode", MODES)
def test_only_what_the_mode_trains_changes(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    trained = trained_model(make_job(tiny_base, tmp_path, **MODES[mode]))
    learning = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    if mode in ADAPTERS:
        assert learning == {name for name, _ in trained.named_parameters() if "lora_" in name}
        suffixes = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if mode == "dora" else set())
        assert {part for name in learning for part in name.split(".") if part.startswith("lora_")} == suffixes
        assert len({name.split(".lora_")[0] for name in learning}) == 2 * 7  # every linear layer of two layers
        return
    before = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).state_dict()
    job = make_job(tiny_base, tmp_path / "run", epochs=1, **MODES[mode])
    run(job)
    after = AutoModelForCausalLM.from_pretrained(best_adapter(job), dtype=torch.float32).state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    if mode == "full":
        assert changed == set(before)
    else:
        top = {name for name in before if name.startswith(("model.layers.1.", "model.norm."))}
        assert changed == learning == top


def trained_model(job: TrainingJob) -> Any:
    return load_trainable(job.base_folder, job.plan.resolved, job.labels, job.start_adapter).model


def test_a_head_that_is_not_tied_is_trained_with_the_last_layers(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = trained_model(make_job(tmp_path / "base", tmp_path, **MODES["last_layers"]))
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


# Merged


@pytest.mark.parametrize("mode", ADAPTERS)
def test_a_merged_model_gives_what_base_and_adapter_give(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    model = trained_model(make_job(tiny_base, tmp_path, **MODES[mode]))
    perturb(model, 3)
    save_best(tmp_path, model, "tiny")
    save_merged(tiny_base, tmp_path / BEST, tmp_path / "merged")
    tokens = torch.tensor([[5, 6, 7, 8, 100, 101, 102]])
    adapted = load_with_adapter(tiny_base, tmp_path / BEST, "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        expected, found, before = (one(input_ids=tokens).logits for one in (adapted, merged, base))
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert float((before - expected).norm()) > 0.01 * float(expected.norm())


@pytest.mark.parametrize("mode", ["lora", "last_layers"])
@pytest.mark.parametrize("method", ["reward", "classification", "regression"])
def test_a_merged_scorer_gives_what_was_trained(tiny_base: Path, tmp_path: Path, method: str, mode: str) -> None:
    job = make_job(tiny_base, tmp_path, epochs=2, **METHODS[method], **MODES[mode])
    _, _, result = run(job)
    assert result is not None
    save = save_merged if mode == "lora" else save_whole
    save(tiny_base, best_adapter(job), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    if method == "classification":
        assert merged.config.id2label == {0: "even", 1: "odd"}
    sides = [side for one in job.validation for side in ((one.chosen, one.rejected) if method == "reward" else (one,))]
    with torch.no_grad():
        outputs = torch.cat([merged(input_ids=torch.tensor([side.tokens])).logits for side in sides])
    labels = torch.tensor([side.label or 0.0 for side in sides])
    margins = outputs[::2, 0] - outputs[1::2, 0]
    expected = {
        "reward": lambda: -torch.nn.functional.logsigmoid(margins) + 0.01 * (outputs[::2, 0] + outputs[1::2, 0]) ** 2,
        "classification": lambda: torch.nn.functional.cross_entropy(outputs, labels.long()),
        "regression": lambda: (outputs[:, 0] - labels).square(),
    }[method]()
    assert float(expected.mean()) == pytest.approx(result.best_valid_loss, rel=1e-5)


def padding_with_its_end(base: Path, folder: Path, *, spare: bool = True) -> Path:
    """Return a base whose padding token is the one in which conversations end, with another special one to spare."""
    changed = Path(shutil.copytree(base, folder))
    end = {"config.json": {"pad_token_id": 2}, "tokenizer_config.json": {"pad_token": "<|im_end|>"}}
    if not spare:
        end["generation_config.json"] = {"eos_token_id": [0, 1, 2]}
    for name, change in end.items():
        path = changed / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return changed


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_merged_scorer_is_read_at_the_end_also_where_its_base_pads_with_that_token(
    tiny_base: Path, tmp_path: Path, mode: str
) -> None:
    base = padding_with_its_end(tiny_base, tmp_path / "base")
    job = make_job(base, tmp_path, **METHODS["reward"], **MODES[mode])
    model = load_trainable(base, job.plan.resolved)
    perturb(model.model, 3)
    save_best(tmp_path, model.model, "tiny")
    save = save_merged if mode == "lora" else save_whole
    save(base, tmp_path / BEST, tmp_path / "merged")
    texts = ["hello world<|im_end|>", "how are you today?<|im_end|>", "good morning"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = merged(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        tokens = [tokenizer(text).input_ids for text in texts]
        units = [TokenizedExample("", one, [False] * len(one)) for one in tokens]
        assert [unit.tokens[-1] for unit in units[:2]] == [2, 2]
        (row,) = model.pack(units, 64)
        expected = model.row_outputs(row)
    assert torch.allclose(found[list(row.examples)], expected, rtol=1e-4, atol=1e-5)


def test_a_scorer_without_a_token_to_pad_with_says_so(tiny_base: Path, tmp_path: Path) -> None:
    """Every special token may end a text: one text at a time is read rightly, and transformers refuses several."""
    base = padding_with_its_end(tiny_base, tmp_path / "base", spare=False)
    model = load_trainable(base, make_job(base, tmp_path, **METHODS["reward"]).plan.resolved)
    save_best(tmp_path, model.model, "tiny")
    save_merged(base, tmp_path / BEST, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged(input_ids=torch.tensor([[5, 6, 2]])).logits.shape == (1, 1)
    with pytest.raises(ValueError, match="no padding token"):
        merged(input_ids=torch.tensor([[5, 6, 2]] * 2))


# Decoders that take no rows


@pytest.mark.parametrize("family", ["gpt2", "stablelm"])
def test_a_decoder_that_takes_no_rows_learns_labels(family: str, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))  # for its tokenizer
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = AutoConfig.for_model(family, **SIZES, **no_dropout, num_key_value_heads=2, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    job, narrow = (
        make_job(base, tmp_path / name, epochs=1, tokens_per_row=tokens, **METHODS["classification"])
        for name, tokens in (("wide", 512), ("narrow", 16))
    )
    assert job.plan.shared_prefix == 0
    assert {reason.name: reason.value for reason in job.plan.reasons}["batches"] == "padded"
    seen, _, result = run(job)
    assert result is not None
    assert [m.train_loss for m in run(narrow)[0]] == pytest.approx([m.train_loss for m in seen], rel=1e-4)
    save_merged(base, best_adapter(job), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        outputs = torch.cat([merged(input_ids=torch.tensor([unit.tokens])).logits for unit in job.validation])
    labels = torch.tensor([int(unit.label or 0) for unit in job.validation])
    loss = float(torch.nn.functional.cross_entropy(outputs, labels))
    assert loss == pytest.approx(result.best_valid_loss, rel=1e-4)


def test_a_base_without_linear_layers_is_not_quantised(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SIZES)).save_pretrained(tmp_path / "base")
    job = make_job(tmp_path / "base", tmp_path, **METHODS["classification"], mode="qlora")
    with pytest.raises(InputError, match="no linear layers to hold in few bits"):
        trained_model(job)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_scorer_is_asked_in_the_precision_that_it_was_trained_in(
    tiny_base: Path, tmp_path: Path, precision: Any
) -> None:
    job = make_job(tiny_base, tmp_path, **METHODS["classification"], precision=precision)
    model = load_trainable(tiny_base, job.plan.resolved, job.labels)
    perturb(model.model, 3)
    save_best(tmp_path, model.model, "tiny")
    (row,) = pack(units(8, "classification"), 4096)
    with torch.no_grad():
        trained = model.row_outputs(row)
        asked = RowModel(load_with_adapter(tiny_base, tmp_path / BEST, precision)).row_outputs(row)
    assert torch.equal(asked, trained)


# Encoders


@pytest.mark.parametrize("mode", ["lora", "last_layers", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_encoder_learned_is_all_in_what_it_leaves(family: str, mode: str, tmp_path: Path) -> None:
    """Their heads start at random, each family's in modules of its own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "base")
    job = make_job_of_encoder(tmp_path, **MODES[mode])
    assert product(job.plan.resolved.method) == "classifier"
    model = load_trainable(job.base_folder, job.plan.resolved, job.labels)
    perturb(model.model, 3)
    save_best(tmp_path, model.model, "tiny")
    torch.manual_seed(1)
    if mode == "lora":
        again = load_with_adapter(job.base_folder, tmp_path / BEST, "float32")
    else:
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / BEST).eval()
    assert torch.allclose(outputs(EncoderModel(again)), outputs(model), rtol=1e-5, atol=1e-6)


def make_job_of_encoder(folder: Path, **options: Any) -> TrainingJob:
    """Return the job of a classifier; the plan's sizes are those of a decoder, which do not matter here."""
    job = make_job(decoder_like(folder), folder, **METHODS["classification"], **options)
    return replace(job, base_folder=folder / "base")


def decoder_like(folder: Path) -> Path:
    AutoConfig.for_model("llama", **SIZES).save_pretrained(folder / "sizes")
    return folder / "sizes"


def outputs(model: EncoderModel | RowModel) -> torch.Tensor:
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for indices, part in model.batches(units(8, "classification"), 64):
            found |= dict(zip(indices, part(), strict=True))
    return torch.stack([found[index] for index in sorted(found)])
