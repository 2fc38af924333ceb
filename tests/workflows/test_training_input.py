"""What cannot be trained is refused before training starts, with the thing, the value and the rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.errors import CapacityError, ConflictError, InputError, LuthierError, MissingDependencyError, RunStopped
from luthier.records.dataset import SplitConfig
from luthier.records.template import Template
from luthier.records.training import StepMetrics, TrainingConfig, TrainingResult
from luthier.store.store import Store
from luthier.templates import column_values
from luthier.templates.renderer import TokenizedExample, TokenizedPair
from luthier.train.memory import data_bytes
from luthier.workflows.datasets import import_dataset, split_dataset
from luthier.workflows.models import pull
from luthier.workflows.templates import save_template
from luthier.workflows.training import TrainRequest, plan

Rows = list[dict[str, Any]]
TEXTS = ("I lost a card", "where is my order", "the fox ran home", "a dog in the morning", "one message", "two tweets")


def rows(count: int = 24, **more: Callable[[int], Any]) -> Rows:
    return [
        {
            "text": f"{TEXTS[i % 6]} number {i}",
            "label": "yes" if i % 2 else "no",
            "side": "test" if i % 6 == 5 else "train",
            **{name: value(i) for name, value in more.items()},
        }
        for i in range(count)
    ]


def request(store: Store, folder: Path, given: Rows, base: str = "tiny-base", **options: Any) -> TrainRequest:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in given), encoding="utf-8")
    import_dataset(store, path, "data")
    dataset = split_dataset(store, "data", SplitConfig(column="side", validation=0.0))
    template = options.pop("template", Template(user="{{text}}", assistant="{{label}}", rejected="{{label}} not"))
    saved = save_template(store, "answer", template)
    config = TrainingConfig.model_validate({"precision": "float32", **options})
    return TrainRequest(base=base, dataset=dataset.reference, template=saved.reference, options=config)


def refused(store: Store, asked: TrainRequest, kind: type[LuthierError] = InputError) -> str:
    with pytest.raises(kind) as error:
        plan(store, asked, measure=False)
    return " ".join([str(error.value), *error.value.problems, error.value.hint or ""])


def test_answers_without_text_carry_no_loss(store: Store, tmp_path: Path) -> None:
    text = refused(store, request(store, tmp_path, rows(), template=Template(user="{{text}}", assistant=" ")))
    assert "no token carries loss" in text


def test_one_example_is_too_few(store: Store, tmp_path: Path) -> None:
    given = [{**row, "side": "train" if i == 0 else "test"} for i, row in enumerate(rows())]
    assert "1 example is too few" in refused(store, request(store, tmp_path, given))


def test_a_label_that_only_the_test_side_has(store: Store, tmp_path: Path) -> None:
    given = [{**row, "label": "perhaps" if row["side"] == "test" else row["label"]} for row in rows()]
    asked = request(store, tmp_path, given, method="classification", columns={"label": "label", "text": "text"})
    text = refused(store, asked)
    assert "perhaps" in text
    assert "yes" in text


def test_weights_that_are_no_numbers(store: Store, tmp_path: Path) -> None:
    given = rows(weight=lambda i: "NaN" if i == 3 else 1.0)
    text = refused(store, request(store, tmp_path, given, columns={"weight": "weight"}))
    assert "weight" in text
    assert "NaN" in text or "nan" in text


def test_a_pair_of_equal_answers(store: Store, tmp_path: Path) -> None:
    same = Template(user="{{text}}", assistant="{{label}}", rejected="{{label}}")
    assert "nothing to prefer" in refused(store, request(store, tmp_path, rows(), method="dpo", template=same))


def test_preferences_without_a_rejected_answer(store: Store, tmp_path: Path) -> None:
    one = Template(user="{{text}}", assistant="{{label}}")
    assert "no rejected answer" in refused(store, request(store, tmp_path, rows(), method="dpo", template=one))


def test_thumbs_that_all_point_up(store: Store, tmp_path: Path) -> None:
    given = rows(thumb=lambda i: "up")
    text = refused(store, request(store, tmp_path, given, method="kto", columns={"thumb": "thumb"}))
    assert "thumb" in text


def test_thumbs_of_one_kind_can_be_measured_where_both_are_learned(store: Store, tmp_path: Path) -> None:
    given = rows(thumb=lambda i: "up" if i % 6 == 5 or i % 2 else "down")
    asked = request(store, tmp_path, given, method="kto", columns={"thumb": "thumb"})
    assert {row["thumb"] for row in given if row["side"] == "test"} == {"up"}
    assert plan(store, asked, measure=False).forward_tokens > 0


def test_a_side_of_which_nothing_can_be_measured_is_left_out(store: Store, tmp_path: Path) -> None:
    given = [{**row, "label": " " if row["side"] == "test" else row["label"]} for row in rows()]
    asked = request(store, tmp_path, given, method="dpo", empty_mask="drop")
    made = plan(store, asked, measure=False)
    assert made.examples == 20
    assert [(one.name, one.value) for one in made.reasons if "side" in one.name] == [("test side", "none")]


def test_a_tokenizer_without_an_end_of_turn(store: Store, tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "endless-base"))
    endless = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": endless}), "utf-8")
    pull(store, str(folder))
    assert "stop token" in refused(store, request(store, tmp_path, rows(), base="endless-base"))


def test_an_encoder_cannot_learn_to_write(store: Store, tiny_encoder: Path, tmp_path: Path) -> None:
    pull(store, str(tiny_encoder))
    text = refused(store, request(store, tmp_path, rows(), base=tiny_encoder.name))
    assert "encoder" in text
    assert "classification" in text


def test_an_unknown_column_is_named_with_the_nearest(store: Store, tmp_path: Path) -> None:
    text = refused(store, request(store, tmp_path, rows(weights=lambda i: 1), columns={"weight": "weight"}))
    assert "weights" in text


def test_resampling_without_a_group_column(store: Store, tmp_path: Path) -> None:
    assert "columns.group" in refused(store, request(store, tmp_path, rows(), resample="balanced"))


def test_a_tracker_that_is_not_installed(store: Store, tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("wandb"):
        pytest.skip("wandb is installed here")
    text = refused(store, request(store, tmp_path, rows(), trackers=["wandb"]), MissingDependencyError)
    assert "pip install wandb" in text


def test_a_checkpoint_of_another_dataset_version(store: Store, tmp_path: Path) -> None:
    from dataclasses import replace

    from luthier.llm.engine.torch_model import measure_machine
    from luthier.train.engine.loop import TrainingJob, train
    from luthier.workflows.material import prepare

    prepared = prepare(store, request(store, tmp_path, rows(), epochs=1, batch_size=4), 8, tmp_path / "tokens")
    made = prepared.plan(measure_machine())
    job = TrainingJob(made, prepared.material.examples, [], prepared.base_folder, "tiny-base", tmp_path / "run")

    def stop() -> None:
        raise RunStopped("after one step")

    with pytest.raises(RunStopped):
        train(job, lambda metrics: None, stop)
    with pytest.raises(ConflictError, match="other examples"):
        train(replace(job, examples=list(prepared.material.examples)[:-1]), lambda metrics: None, stop)


ANSWERED = Template(user="{{text}}", assistant="{{label}}")
LARGE: dict[str, dict[str, Any]] = {
    "supervised": {"template": ANSWERED},
    "raw_text": {"method": "raw_text", "template": ANSWERED},
    "dpo": {"method": "dpo", "columns": {"margin": "m", "weight": "w"}},
    "orpo": {"method": "orpo", "columns": {"weight": "w"}},
    "kto": {"method": "kto", "columns": {"thumb": "t", "weight": "w"}, "template": ANSWERED},
    "classification": {"method": "classification", "columns": {"label": "label", "weight": "w"}},
    "regression": {"method": "regression", "columns": {"label": "m", "weight": "w"}},
    "resampled": {"resample": {"yes": 2.5}, "columns": {"group": "label"}, "template": ANSWERED},
    "balanced": {"method": "classification", "resample": "balanced", "columns": {"label": "label", "group": "w"}},
}


def large(store: Store, folder: Path, case: str) -> TrainRequest:
    given = rows(m=lambda i: i / 8, w=lambda i: 1 + i % 3, t=lambda i: "up" if i % 2 else "down")
    return request(store, folder, given, **LARGE[case])


@pytest.mark.parametrize("case", LARGE)
def test_a_data_set_that_does_not_fit_into_memory_is_planned_as_any_other(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from luthier.templates.spool import SpooledExamples, SpooledPairs
    from luthier.workflows import material

    monkeypatch.setattr(column_values, "EXAMPLES_AT_ONCE", 7)
    asked = large(store, tmp_path, case)
    held = material.prepare(store, asked, 8, tmp_path / "held")
    assert isinstance(held.material.examples, list)
    monkeypatch.setattr(material, "LARGE_BYTES", 0)
    spooled = material.prepare(store, asked, 8, tmp_path / "spooled")
    assert isinstance(spooled.material.examples, SpooledPairs if case in ("dpo", "orpo") else SpooledExamples)
    assert list(spooled.material.examples) == held.material.examples
    assert spooled.material.report == held.material.report
    assert spooled.labels == held.labels
    assert list(spooled.test) == list(held.test)
    made = plan(store, asked, measure=False)
    assert made.tokens_per_epoch == tokens_of(held.material.examples)
    assert made.data_bytes == data_bytes(len(held.test), tokens_of(held.test))


def tokens_of(units: Iterable[TokenizedExample | TokenizedPair]) -> int:
    return sum(len(one.tokens) for unit in units for one in sides(unit))


@pytest.mark.parametrize("case", ["classification", "regression", "resampled", "balanced"])
def test_training_from_disk_gives_the_numbers_of_training_from_memory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from luthier.llm.engine.torch_model import measure_machine
    from luthier.train.engine.loop import TrainingJob, train
    from luthier.workflows import material

    asked, machine = large(store, tmp_path, case), measure_machine()

    def numbers(name: str) -> tuple[list[StepMetrics], TrainingResult]:
        prepared = material.prepare(store, asked, 8, tmp_path / name / "units")
        made = prepared.plan(machine)
        examples, folder = prepared.material.examples, prepared.base_folder
        steps: list[StepMetrics] = []
        job = TrainingJob(made, examples, prepared.test, folder, "tiny-base", tmp_path / name, labels=prepared.labels)
        return steps, train(job, steps.append, lambda: None)

    (held, result) = numbers("held")
    monkeypatch.setattr(material, "LARGE_BYTES", 0)
    (read, again) = numbers("spooled")
    assert len(held) > 4
    timed = {"tokens_per_second": 0, "seconds_left": 0}
    assert [one.model_copy(update=timed) for one in read] == [one.model_copy(update=timed) for one in held]
    assert (again.best_valid_loss, again.valid_metrics) == (result.best_valid_loss, result.valid_metrics)


CLASSES = {"method": "classification", "columns": {"label": "label"}}
NUMBERS = {"method": "regression", "columns": {"label": "n"}}
GROUPS = {"resample": "balanced", "columns": {"group": "group"}}


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        (
            {"label": lambda i: "" if i in (2, 13, 21) else "yes"},
            CLASSES,
            "3 of 20 examples have no label in the field",
        ),
        ({"label": lambda i: "yes"}, CLASSES, "two classes or more; the labels are: yes"),
        ({}, {"method": "classification"}, "No label column is named. Did you mean 'label'?"),
        ({"text": lambda i: " " if i in (2, 13) else "a"}, CLASSES, "2 texts cannot be learned from"),
        ({"text": lambda i: " "}, CLASSES | {"empty_mask": "drop"}, "No text is left to learn from"),
        ({"n": lambda i: "many" if i in (2, 13, 21) else i}, NUMBERS, "3 texts cannot be learned from"),
        ({"n": lambda i: i, "w": lambda i: 0}, NUMBERS | {"columns": {"label": "n", "weight": "w"}}, "All 20 weights"),
        ({"group": lambda i: None if i in (2, 13, 21) else "a"}, GROUPS, "3 of 20 examples have no group"),
        ({"groups": lambda i: "a"}, GROUPS, "no field 'group' to take the groups from. Did you mean 'groups'?"),
        ({"group": lambda i: "a"}, GROUPS | {"resample": {"b": 2, "a": -1}}, "there is no group 'b'. Known: 'a'."),
        ({"group": lambda i: "a"}, GROUPS | {"resample": {"a": 0}}, "every group that there is has the factor 0"),
    ],
)
def test_what_a_large_data_set_cannot_do_is_told_as_of_any_other(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Callable[[int], Any]],
    options: dict[str, Any],
    said: str,
) -> None:
    from luthier.workflows import material

    asked = request(store, tmp_path, rows(**more), **options)
    held = refused(store, asked)
    monkeypatch.setattr(material, "LARGE_BYTES", 0)
    assert refused(store, asked) == held
    assert said in held


def sides(unit: TokenizedExample | TokenizedPair) -> tuple[TokenizedExample, ...]:
    return (unit.chosen, unit.rejected) if isinstance(unit, TokenizedPair) else (unit,)


ANSWERS = Template(user="{{text}}", assistant="{{answer}}")


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every data set as one that does not fit into memory, and read it in parts of 7 examples."""
    from luthier.workflows import material

    monkeypatch.setattr(material, "LARGE_BYTES", 0)
    monkeypatch.setattr(column_values, "EXAMPLES_AT_ONCE", 7)


@pytest.mark.usefixtures("in_parts")
def test_a_part_of_a_large_data_set_may_be_empty_or_weightless(store: Store, tmp_path: Path) -> None:
    given = rows(answer=lambda i: " " if i < 9 else "yes", w=lambda i: 1 if i > 19 else 0)
    options = {"template": ANSWERS, "empty_mask": "drop", "columns": {"weight": "w"}}
    made = plan(store, request(store, tmp_path, given, **options), measure=False)
    assert made.dropped == {"empty_mask": 8}
    assert made.examples == 12


@pytest.mark.usefixtures("in_parts")
def test_what_all_parts_of_a_large_data_set_cannot_learn_is_told_at_once(store: Store, tmp_path: Path) -> None:
    given = rows(answer=lambda i: " " if i in (2, 13, 21) else "yes")
    text = refused(store, request(store, tmp_path, given, template=ANSWERS))
    assert "3 examples cannot be learned" in text
    assert text.count("no token carries loss") >= 3


@pytest.mark.usefixtures("in_parts")
def test_wrong_weights_of_all_parts_are_told_at_once(store: Store, tmp_path: Path) -> None:
    given = rows(answer=lambda i: "yes", w=lambda i: -1 if i in (2, 13, 21) else 1)
    text = refused(store, request(store, tmp_path, given, template=ANSWERS, columns={"weight": "w"}))
    assert "3 values are not valid" in text
    assert text.count("weight -1") >= 3


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize(
    ("answer", "weight", "message"), [(" ", 1, "No example is left"), ("yes", 0, "nothing is left to learn")]
)
def test_a_large_data_set_of_which_nothing_is_left(
    store: Store, tmp_path: Path, answer: str, weight: int, message: str
) -> None:
    given = rows(answer=lambda i: answer, w=lambda i: weight)
    options = {"template": ANSWERS, "empty_mask": "drop", "columns": {"weight": "w"}}
    assert message in refused(store, request(store, tmp_path, given, **options))


def test_what_repeats_examples_until_they_do_not_fit_is_read_from_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflows import material

    more = large(store, tmp_path, "resampled")
    monkeypatch.setattr(material, "LARGE_BYTES", 1.3 * store.datasets.bytes(store.datasets.get(more.dataset or "")))
    assert not isinstance(material.prepare(store, more, 8, tmp_path / "units").material.examples, list)
    fewer = more.model_copy(update={"options": more.options.model_copy(update={"resample": {"yes": 0.5}})})
    assert isinstance(material.prepare(store, fewer, 8, tmp_path / "units").material.examples, list)


def test_sides_that_are_measured_and_would_not_fit_are_refused_before_anything_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflows import material

    asked = large(store, tmp_path, "classification")
    monkeypatch.setattr(material, "HELD_FOR_A_BYTE", 10**12)
    text = refused(store, asked, CapacityError)
    assert "that are measured (validation, test)" in text
    assert "luthier dataset split data --validation 0.01" in text
    answers = request(store, tmp_path, rows())  # evaluations alone ask for its test side
    assert not isinstance(material.prepare(store, answers, 8, tmp_path / "units").material.examples, list)


def test_prompts_are_drawn_from_a_whole_side_without_holding_it() -> None:
    from luthier.records.example import Example
    from luthier.workflows import material

    examples = [Example(id=str(index), fields={}) for index in range(5_000)]
    drawn = material._drawn(iter(examples), 0)
    assert len({example.id for example in drawn}) == material.ASKED_EXAMPLES
    assert 2_300 < sum(int(example.id) for example in drawn) / len(drawn) < 2_700
    assert material._drawn(examples[:9], 0) == examples[:9]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dpo": {"beta": 0.2}}, "dpo"),
        ({"mode": "full", "lora_rank": 8}, "lora_rank"),
        ({"base_bits": 8}, "base_bits"),
        ({"method": "classification", "too_long": "drop"}, "too_long"),
        ({"method": "kto", "equal_answers": "drop"}, "equal_answers"),
    ],
)
def test_options_that_would_do_nothing(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError, match=f"no effect: {name} "):
        TrainingConfig.model_validate(options)


@pytest.mark.parametrize("mode", ["full", "last_layers", "qlora"])
def test_products_in_integers_are_for_a_base_that_is_frozen_and_whole(mode: str) -> None:
    with pytest.raises(ValidationError, match=f"precision=int8 multiplies a frozen base: .*, not {mode}"):
        TrainingConfig.model_validate({"mode": mode, "precision": "int8"})
