"""Every method learns a rule, and goes on after a stop as if nothing had happened."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from luthier.errors import CapacityError, ConflictError, InputError, RunStopped
from luthier.llm.base_config import read_adapter
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import load_base
from luthier.records.base_model import Machine
from luthier.records.objectives import PAIRED
from luthier.records.training import ADAPTERS, StepMetrics, TrainingConfig, TrainingResult
from luthier.templates.renderer import RenderReport, TokenizedExample, TokenizedPair
from luthier.templates.spool import SpooledExamples, SpooledPairs
from luthier.train.engine import checkpoint
from luthier.train.engine.loop import TrainingJob, best_adapter, train
from luthier.train.engine.samples import answer_samples
from luthier.train.engine.trainable import load_trainable
from luthier.train.notes import Note, PreparationNote, SampleNote, WarningNote
from luthier.train.plan import Material, plan_training
from luthier.workflows.models import shape

MACHINE = Machine(cores=2, memory_bytes=24 * 10**9, has_fast_bfloat16=False, int8_speed=4.0, matmul_flops=1e11)
ASKED, ANSWER = 50, 60  # a question is one of two tokens, and so is its answer
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "raw_text": {"method": "raw_text"},
    "dpo": {"method": "dpo", "dpo": {"beta": 0.5}},
    "ipo": {"method": "dpo", "dpo": {"beta": 0.5, "loss": "ipo"}},
    "orpo": {"method": "orpo", "orpo": {"beta": 0.5}},
    "kto": {"method": "kto", "kto": {"beta": 0.5}},
    "reward": {"method": "reward", "reward": {"centre": 0.01}},
    "classification": {"method": "classification"},
    "regression": {"method": "regression"},
}
LABELLED = ("classification", "regression")


def unit(index: int, method: str) -> TokenizedExample | TokenizedPair:
    """Return a unit of which the last token, the preference, the thumb or the label follows from the question."""
    odd = index % 2
    prompt = [5, 6, 7, 8, *[20 + index % 7] * (1 + index % 5), ASKED + odd]
    if method in LABELLED:
        return TokenizedExample(str(index), prompt, [False] * len(prompt), label=float(odd))
    sides = [
        TokenizedExample(str(index), [*prompt, answer], [method == "raw_text"] * len(prompt) + [True])
        for answer in (ANSWER + odd, ANSWER + 1 - odd)
    ]
    if method in PAIRED:
        return TokenizedPair(str(index), *sides)
    liked = index // 2 % 2 == 0
    return replace(sides[0 if liked or method != "kto" else 1], label=float(liked))


def units(count: int, method: str, first: int = 0) -> list[Any]:
    return [unit(first + index, method) for index in range(count)]


def make_job(base: Path, folder: Path, **options: Any) -> TrainingJob:
    defaults = {"epochs": 6, "batch_size": 8, "precision": "float32", "learning_rate": 1e-2}
    if options.get("mode", "lora") in ADAPTERS:
        defaults["lora_rank"] = 4
    config = TrainingConfig.model_validate(defaults | options)
    examples, validation = units(32, config.method), units(8, config.method, first=40)
    plan = plan_training(Material(examples, validation, RenderReport()), config, shape(base, 200_000), MACHINE)
    labels = ("even", "odd") if config.method == "classification" else ()
    return TrainingJob(plan, examples, validation, base, "tiny", folder, labels=labels)


def run(job: TrainingJob, stop_at: int | None = None) -> tuple[list[StepMetrics], list[Note], TrainingResult | None]:
    seen: list[StepMetrics] = []
    notes: list[Note] = []

    def stop() -> None:
        if stop_at and len(seen) == stop_at:
            raise RunStopped("asked to")

    try:
        return seen, notes, train(job, seen.append, stop, notes.append)
    except RunStopped:
        return seen, notes, None


def saved(job: TrainingJob) -> dict[str, torch.Tensor]:
    (path,) = best_adapter(job).glob("*.safetensors")
    return dict(load_file(path))


CASES = [pytest.param("tiny_base", method, id=method) for method in METHODS] + [
    pytest.param("tiny_encoder", method, id=f"encoder-{method}") for method in LABELLED
]


@pytest.mark.parametrize(("base", "method"), CASES)
def test_a_method_learns_a_rule(base: str, method: str, request: Any, tmp_path: Path) -> None:
    longer = {"epochs": 12, "learning_rate": 3e-2} if base == "tiny_encoder" else {}
    options = METHODS[method] | longer
    seen, notes, result = run(make_job(request.getfixturevalue(base), tmp_path, validations=6, **options))
    valid = [metrics for metrics in seen if metrics.valid_loss is not None]
    assert result is not None
    assert result.best_valid_loss is not None
    assert result.best_valid_loss < 0.5 * (valid[0].valid_loss or 0)
    accuracy = {"reward_accuracy", "thumb_accuracy", "token_accuracy", "accuracy"} & set(result.valid_metrics)
    assert method == "regression" or [result.valid_metrics[name] for name in accuracy] == [
        pytest.approx(1.0, abs=0.7 if method == "raw_text" else 0.01)
    ]
    prepared = [note.share for note in notes if isinstance(note, PreparationNote)]
    assert (prepared[-1:] == [1.0]) == (method in ("dpo", "ipo", "kto"))


@pytest.mark.parametrize("method", ["supervised", "kto"])
def test_a_test_side_that_begins_otherwise_is_measured_as_it_is(method: str, tiny_base: Path, tmp_path: Path) -> None:
    def otherwise(unit: TokenizedExample) -> TokenizedExample:
        return replace(unit, tokens=[9, *unit.tokens[2:]], loss_mask=unit.loss_mask[1:])

    test = [otherwise(unit) for unit in units(6, method, first=60)]
    job = replace(make_job(tiny_base, tmp_path / "all", epochs=1, **METHODS[method]), test=test)
    assert job.plan.shared_prefix == 4
    result = run(job)[2]
    assert result is not None
    if method == "supervised":
        apart = [run(replace(job, test=[one], folder=tmp_path / one.example_id))[2] for one in test]
        losses = [one.test_metrics["loss"] for one in apart if one is not None]
        assert result.test_metrics["loss"] == pytest.approx(sum(losses) / len(test), rel=1e-5)
    narrow = replace(job, folder=tmp_path / "narrow")
    plan = job.plan.model_copy(update={"resolved": job.plan.resolved.model_copy(update={"tokens_per_row": 2})})
    one_by_one = run(replace(narrow, plan=plan))[2]
    assert one_by_one is not None
    assert result.test_metrics == pytest.approx(one_by_one.test_metrics, rel=1e-4)


def test_a_step_without_memory_says_what_would_fit(tiny_base: Path, tmp_path: Path) -> None:
    def no_memory(metrics: StepMetrics) -> None:
        raise MemoryError("no memory for attend")

    with pytest.raises(CapacityError, match="out of memory, in rows of 1,024 tokens: no memory for attend") as ended:
        train(make_job(tiny_base, tmp_path), no_memory, lambda: None)
    assert "memory" in (ended.value.hint or "")


RANDOM = {"supervised": {"neftune_alpha": 5.0}, "lora_dropout": 0.2}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        *(pytest.param("tiny_base", options, id=method) for method, options in METHODS.items()),
        *(pytest.param("tiny_encoder", METHODS[method], id=f"encoder-{method}") for method in LABELLED),
        pytest.param("tiny_base", {"optimizer": "adamw_8bit", "lora_rank": 64}, id="adamw_8bit"),
        pytest.param("tiny_base", {"optimizer": "adamw_8bit", "mode": "full"}, id="adamw_8bit-full"),
        pytest.param("tiny_base", RANDOM, id="neftune-dropout"),
        pytest.param("tiny_base", METHODS["kto"] | {"lora_dropout": 0.2}, id="kto-dropout"),
        pytest.param("tiny_base", {"mode": "last_layers", "last_layers": 1}, id="last_layers"),
        pytest.param("tiny_base", {"mode": "qlora"}, id="qlora"),
    ],
)
def test_a_stopped_run_goes_on_to_the_very_same_numbers(
    base: str, options: dict[str, Any], request: Any, tmp_path: Path
) -> None:
    options = {"epochs": 1, "batch_size": 4, "learning_rate": 3e-3} | options
    folder = request.getfixturevalue(base)
    whole, parts = (make_job(folder, tmp_path / name, **options) for name in ("whole", "parts"))
    steps = run(whole)[0]
    run(parts, stop_at=3)
    rest = run(parts)[0]
    assert [metrics.step for metrics in rest] == [4, 5, 6, 7, 8]
    assert [told(metrics) for metrics in rest] == [told(metrics) for metrics in steps[3:]]
    assert saved(whole).keys() == saved(parts).keys()
    assert all(torch.equal(tensor, saved(parts)[name]) for name, tensor in saved(whole).items())


def told(metrics: StepMetrics) -> tuple[Any, ...]:
    return metrics.train_loss, metrics.gradient_norm, metrics.train_metrics, metrics.valid_loss, metrics.valid_metrics


# What a run says, and when it ends


def test_training_stops_early_and_says_why(tiny_base: Path, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, epochs=10, validations=20, early_stopping=2)
    turned = [replace(unit, tokens=[*unit.tokens[:-1], ANSWER + 2]) for unit in job.validation]
    seen, _, result = run(replace(job, validation=turned))
    assert result is not None
    assert result.stopped_early is not None
    assert "has not improved" in result.stopped_early
    assert f"at step {result.best_step}" in result.stopped_early
    assert result.steps == seen[-1].step < job.plan.steps
    assert [metrics.step for metrics in run(replace(job, validation=turned))[0]] == []


def test_an_absurd_learning_rate_is_warned_of(tiny_base: Path, tmp_path: Path) -> None:
    _, notes, _ = run(
        make_job(tiny_base, tmp_path, epochs=10, learning_rate=30.0, schedule="constant", warmup_share=0.5)
    )
    warned = [note.warning for note in notes if isinstance(note, WarningNote)]
    assert warned
    assert all("learning_rate_multiplier" in warning.hint for warning in warned)


def test_samples_are_answered_at_each_validation(tiny_base: Path, tmp_path: Path) -> None:
    job = make_job(tiny_base, tmp_path, validations=2)
    prompts = tuple(tuple(unit.tokens[:-1]) for unit in job.validation[:3])
    _, notes, _ = run(replace(job, sample_prompts=prompts, sample_tokens=4, stop_tokens=frozenset({ANSWER})))
    samples = [note for note in notes if isinstance(note, SampleNote)]
    assert [note.step for note in samples] == [12, 24]
    assert samples[-1].answers[0] == samples[-1].answers[2] == []  # the answer is the token that ends it
    assert samples[-1].answers[1][0] == ANSWER + 1
    assert 1 <= len(samples[-1].answers[1]) <= 4


def test_samples_are_those_that_transformers_would_write(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = make_job(tiny_base, tmp_path, epochs=1, validations=1)
    prompts = tuple(tuple(unit.tokens[:-1]) for unit in job.validation[:3])
    _, notes, _ = run(replace(job, sample_prompts=prompts, sample_tokens=6))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(best_adapter(job)))
    for prompt, answer in zip(
        prompts, next(note.answers for note in notes if isinstance(note, SampleNote)), strict=True
    ):
        written = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert written[0, len(prompt) :].tolist() == answer


def test_samples_pass_each_prompt_through_the_model_once(tiny_base: Path) -> None:
    base = load_base(tiny_base, "float32")
    base.generation_config.repetition_penalty = 9.0  # a habit of the base that training does not have
    model, passed = RowModel(base), []
    base.get_input_embeddings().register_forward_hook(lambda _, tokens, __: passed.append(tokens[0].numel()))
    prompts = [[5 + place % 300 for place in range(length)] for length in (40, 37, 400)]
    answers = answer_samples(model, prompts, frozenset(), 8)
    assert [len(answer) for answer in answers] == [8, 8, 8]
    assert sum(passed) == 3 * 400 + 3 * 7  # so few texts are padded to one length
    for prompt, answer in zip(prompts, answers, strict=True):
        text = [*prompt, *answer]
        (row,) = model.pack([TokenizedExample("", text, [False] * len(prompt) + [True] * len(answer))], 512)
        with torch.no_grad():
            assert model.targets(row).chosen_M.tolist() == answer
    assert base.generation_config.repetition_penalty == 9.0


# What is computed before the first step


def reference(job: TrainingJob) -> torch.Tensor:
    return load_file(job.folder / "reference.safetensors")["logprobs"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_that_was_cut_short_goes_on_where_it_was(tiny_base: Path, tmp_path: Path, method: str) -> None:
    options = {**METHODS[method], "epochs": 0.25}
    whole, parts = (make_job(tiny_base, tmp_path / name, **options) for name in ("whole", "parts"))
    run(whole)
    heard: list[float] = []

    def note(note: Note) -> None:
        if isinstance(note, PreparationNote):
            heard.append(note.share)

    def stop() -> None:
        if len(heard) == 2:
            raise RunStopped("asked to")

    with pytest.raises(RunStopped):
        train(parts, lambda metrics: None, stop, note)
    assert heard[-1] < 1
    train(parts, lambda metrics: None, lambda: None, note)
    assert heard == sorted(set(heard))  # nothing was computed twice
    assert heard[-1] == 1
    assert torch.equal(reference(parts), reference(whole))


def test_a_kill_while_the_reference_is_computed_loses_seconds(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.train.engine.objectives.reference.SAVE_SECONDS", 0.0)
    job = make_job(tiny_base, tmp_path, **METHODS["dpo"] | {"epochs": 0.25})
    kept: list[float] = []

    def note(note: Note) -> None:
        if isinstance(note, PreparationNote):
            with safe_open(job.folder / "reference.safetensors", "pt") as file:
                kept.append(int(file.metadata()["units"]) / 40 / note.share)

    train(job, lambda metrics: None, lambda: None, note)
    assert kept == [pytest.approx(1.0)] * 3


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_in_an_older_order_is_computed_again(tiny_base: Path, tmp_path: Path, method: str) -> None:
    job = make_job(tiny_base, tmp_path, **METHODS[method] | {"epochs": 0.25})
    run(job)
    path, right = job.folder / "reference.safetensors", reference(job)
    with safe_open(path, "pt") as file:
        known = file.metadata()["fingerprint"]
    save_file({"logprobs": right.flatten() - 1}, path, {"fingerprint": known, "groups": str(len(right))})
    run(job)
    assert torch.equal(reference(job), right)


class Fresh(Sequence[Any]):
    """Units that nobody holds: each is made when it is read. Twice in a pass, those that are there are counted."""

    def __init__(self, count: int, method: str) -> None:
        self._count, self._method = count, method
        self._before, self.most = alive(), 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        place = range(self._count)[index]
        if place % 111 == 15:
            self.most = max(self.most, alive() - self._before)
        return unit(place, self._method)


def alive() -> int:
    return sum(type(one) is TokenizedExample for one in gc.get_objects())


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_is_asked_without_holding_all_units(tiny_base: Path, tmp_path: Path, method: str) -> None:
    job = make_job(tiny_base, tmp_path, **METHODS[method] | {"epochs": 0.25})
    fresh = Fresh(200, method)
    shares: list[float] = []

    def note(note: Note) -> None:
        if isinstance(note, PreparationNote):
            shares.append(note.share)

    train(replace(job, examples=fresh, validation=()), lambda metrics: None, lambda: None, note)
    assert len(shares) == 13  # 16 of 200 units at a time
    assert 16 < fresh.most < 40


# Going on from an adapter


@pytest.mark.parametrize("method", ["supervised", "dpo", "reward", "classification"])
def test_training_goes_on_from_an_adapter(tiny_base: Path, tmp_path: Path, method: str) -> None:
    options = {"epochs": 1, "batch_size": 32, **METHODS[method]}
    first = make_job(tiny_base, tmp_path / "first", **options | {"epochs": 3})
    held_out = run(first)[2]
    second = replace(make_job(tiny_base, tmp_path / "second", **options), start_adapter=best_adapter(first))
    again = replace(second, examples=second.validation * 4, folder=tmp_path / "again")
    assert held_out is not None
    loss = run(again)[0][0].train_loss
    # A preference is measured against the model that it starts from: nothing has moved yet.
    assert loss == pytest.approx(0.6931472 if method == "dpo" else held_out.best_valid_loss, rel=1e-5)
    assert sorted(saved(again)) == sorted(saved(first))


def test_dropout_does_not_blur_what_a_preference_is_measured_against(tiny_base: Path, tmp_path: Path) -> None:
    options = {**METHODS["dpo"], "lora_dropout": 0.5, "epochs": 0.25}
    first = make_job(tiny_base, tmp_path / "first", **options | {"learning_rate": 0.1})
    run(first)
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        run(replace(make_job(tiny_base, folder, seed=seed, **options), start_adapter=best_adapter(first)))
    one, two = (load_file(folder / "reference.safetensors")["logprobs"] for folder in folders)
    assert torch.equal(one, two)


@pytest.mark.parametrize("mode", ["lora", "rslora", "dora"])
def test_going_on_from_an_adapter_records_that_adapter(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    first = make_job(tiny_base, tmp_path / "first", mode=mode, epochs=0.25, lora_alpha=12, lora_dropout=0.1)
    run(first)
    start = read_adapter(best_adapter(first))
    config = TrainingConfig(epochs=1, batch_size=8, precision="float32")
    material = Material(first.examples, first.validation, RenderReport())
    plan = plan_training(material, config, shape(tiny_base, 200_000), MACHINE, start)
    resolved = plan.resolved
    assert (resolved.mode, resolved.lora_rank, resolved.lora_alpha, resolved.lora_dropout) == (mode, 4, 12, 0.1)
    assert {r.name: r.value for r in plan.reasons}["LoRA rank"] == "4"
    second = replace(first, plan=plan, folder=tmp_path / "second", start_adapter=best_adapter(first))
    run(second)
    assert read_adapter(best_adapter(second)) == start


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_base_is_refused(tiny_base: Path, tmp_path: Path, change: dict[str, int]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    other = tmp_path / "other"
    config = AutoConfig.from_pretrained(tiny_base, **change)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    first = make_job(other, tmp_path / "first", epochs=1)
    run(first)
    with pytest.raises(InputError, match="does not fit this base") as refused:
        run(replace(make_job(tiny_base, tmp_path / "second"), start_adapter=best_adapter(first)))
    assert "same base model" in (refused.value.hint or "")


def test_an_adapter_of_another_method_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    first = make_job(tiny_base, tmp_path / "first", epochs=1, method="classification")
    run(first)
    with pytest.raises(InputError, match="does not fit this base"):
        run(replace(make_job(tiny_base, tmp_path / "second"), start_adapter=best_adapter(first)))


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_checkpoint_of_something_else_is_refused_before_the_reference_is_asked(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    run(make_job(tiny_base, tmp_path, method=method), stop_at=2)
    reference = (tmp_path / "reference.safetensors").read_bytes()
    with pytest.raises(ConflictError, match="other examples or options"):
        run(make_job(tiny_base, tmp_path, method=method, learning_rate=1e-3))
    assert (tmp_path / "reference.safetensors").read_bytes() == reference


@pytest.mark.parametrize("mode", ["full", "last_layers", "lora"])
def test_the_best_weights_are_put_back(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    model = load_trainable(tiny_base, make_job(tiny_base, tmp_path, mode=mode).plan.resolved).model
    put_back(model, tmp_path / "best")


@pytest.mark.parametrize("mode", ["full", "last_layers"])
def test_the_best_weights_of_a_family_whose_files_have_other_names_are_put_back(
    tiny_encoder: Path, tmp_path: Path, mode: str
) -> None:
    base = Path(shutil.copytree(tiny_encoder, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    old = {name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in tensors}
    save_file({old[name]: tensor for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    job = make_job(base, tmp_path, mode=mode, method="classification")
    model = load_trainable(base, job.plan.resolved, ("even", "odd")).model
    put_back(model, tmp_path / "best")
    assert any("gamma" in name for name in load_file(tmp_path / "best" / "best" / "model.safetensors"))


def put_back(model: Any, folder: Path) -> None:
    with torch.no_grad():
        for parameter in checkpoint.trainable(model).values():
            parameter.normal_()
    before = {name: parameter.detach().clone() for name, parameter in checkpoint.trainable(model).items()}
    checkpoint.save_best(folder, model, "tiny")
    with torch.no_grad():
        for parameter in checkpoint.trainable(model).values():
            parameter.add_(1.0)
    checkpoint.load_best(folder, model)
    for name, parameter in checkpoint.trainable(model).items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("base", "method"),
    [
        *(("tiny_base", method) for method in ("supervised", "dpo", "kto", *LABELLED)),
        *(("tiny_encoder", method) for method in LABELLED),
    ],
)
def test_units_on_disk_give_the_numbers_of_those_in_memory(
    base: str, method: str, request: Any, tmp_path: Path
) -> None:
    job = make_job(request.getfixturevalue(base), tmp_path / "held", method=method)
    kind: Any = SpooledPairs if method == "dpo" else SpooledExamples
    spooled = replace(job, examples=kind.write(tmp_path / "units", job.examples), folder=tmp_path / "spooled")
    (held, _, _), (read, _, _) = run(job), run(spooled, stop_at=5)
    read += run(spooled)[0]  # goes on from disk, too
    assert [told(one) for one in read] == [told(one) for one in held]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_units_that_are_there_several_times_have_one_reference(tiny_base: Path, tmp_path: Path, method: str) -> None:
    """As resampling repeats them; also on disk, and after a stop within the reference."""
    job = make_job(tiny_base, tmp_path / "held", **METHODS[method] | {"epochs": 1})
    job = replace(job, examples=[one for one in job.examples for _ in range(1 + int(one.example_id) % 3)])
    kind: Any = SpooledPairs if method == "dpo" else SpooledExamples
    spooled = replace(job, examples=kind.write(tmp_path / "units", job.examples), folder=tmp_path / "spooled")

    def stop() -> None:
        raise RunStopped("asked to")

    with pytest.raises(RunStopped):
        train(spooled, lambda metrics: None, stop)
    (held, _, _), (read, _, _) = run(job), run(spooled)
    assert [told(one) for one in read] == [told(one) for one in held]
    assert torch.equal(reference(spooled), reference(job))
    # Before its first step a model is as likely as its reference to say anything.
    assert held[0].train_metrics["reward_margin" if method == "dpo" else "drift"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_adapters_sit_on_the_layers_that_are_named(tiny_base: Path, tmp_path: Path, mode: str) -> None:
    job = make_job(tiny_base, tmp_path, mode=mode, lora_layers=["v_proj", "down_proj"], epochs=1)
    run(job)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in saved(job)}
    assert names == {"v_proj", "down_proj"}
    with pytest.raises(InputError, match=r"no linear layer 'w_proj'.*Did you mean 'v_proj'"):
        run(make_job(tiny_base, tmp_path / "other", mode=mode, lora_layers=["w_proj"]))
    with pytest.raises(InputError, match="no linear layer 'lm_head'"):
        run(make_job(tiny_base, tmp_path / "head", mode=mode, lora_layers=["lm_head"]))
