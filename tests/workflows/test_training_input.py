"""What cannot be trained is refused before training starts, with the thing, the value and the rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.errors import CapacityError, ConflictError, InputError, LuthierError, MissingDependencyError, RunStopped
from luthier.records.dataset import SplitConfig
from luthier.records.template import Template
from luthier.records.training import TrainingConfig
from luthier.store.store import Store
from luthier.templates import renderer
from luthier.templates.renderer import TokenizedExample, TokenizedPair
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


LARGE: dict[str, dict[str, Any]] = {
    "supervised": {"template": Template(user="{{text}}", assistant="{{label}}")},
    "raw_text": {"template": Template(user="{{text}}", assistant="{{label}}")},
    "dpo": {"columns": {"margin": "m", "weight": "w"}},
    "kto": {"columns": {"thumb": "t", "weight": "w"}, "template": Template(user="{{text}}", assistant="{{label}}")},
}


@pytest.mark.parametrize("method", LARGE)
def test_a_data_set_that_does_not_fit_into_memory_is_planned_as_any_other(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from luthier.templates.spool import SpooledExamples, SpooledPairs
    from luthier.workflows import material

    monkeypatch.setattr(renderer, "EXAMPLES_AT_ONCE", 7)
    given = rows(m=lambda i: i / 8, w=lambda i: 1 + i % 3, t=lambda i: "up" if i % 2 else "down")
    asked = request(store, tmp_path, given, method=method, **LARGE[method])
    held = material.prepare(store, asked, 8, tmp_path / "held")
    monkeypatch.setattr(material, "LARGE_BYTES", 0)
    spooled = material.prepare(store, asked, 8, tmp_path / "spooled")
    assert isinstance(spooled.material.examples, SpooledPairs if method == "dpo" else SpooledExamples)
    assert list(spooled.material.examples) == list(held.material.examples)
    assert spooled.material.report == held.material.report
    tokens = sum(len(side.tokens) for unit in held.material.examples for side in sides(unit))
    assert plan(store, asked, measure=False).tokens_per_epoch == tokens


def sides(unit: TokenizedExample | TokenizedPair) -> tuple[TokenizedExample, ...]:
    return (unit.chosen, unit.rejected) if isinstance(unit, TokenizedPair) else (unit,)


ANSWERS = Template(user="{{text}}", assistant="{{answer}}")


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every data set as one that does not fit into memory, and read it in parts of 7 examples."""
    from luthier.workflows import material

    monkeypatch.setattr(material, "LARGE_BYTES", 0)
    monkeypatch.setattr(renderer, "EXAMPLES_AT_ONCE", 7)


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


def test_a_data_set_whose_lists_would_not_fit_is_refused_before_they_are_made(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflows import material

    asked = request(store, tmp_path, rows(), resample="balanced", columns={"group": "label"})
    assert plan(store, asked, measure=False).examples == 24  # 12 of each
    monkeypatch.setattr(material, "HELD_FOR_A_BYTE", 10**12)
    assert "held in memory with this method, or with resample" in refused(store, asked, CapacityError)
    streamed = asked.model_copy(update={"options": TrainingConfig(precision="float32")})
    assert not isinstance(material.prepare(store, streamed, 8, tmp_path / "units").material.examples, list)


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
