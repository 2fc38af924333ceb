"""Parts of a batch in two lanes give the numbers that they give one after the other, in every run the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from luthier.llm.rows import LEAST_IN_LANE, pack
from luthier.records.training import TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.engine.lanes import LANES, Lanes, forward, lane_count
from luthier.train.engine.objectives.supervised import Supervised
from luthier.train.engine.optimizers import make_optimizer, parameter_groups
from luthier.train.plan import Material, plan_training
from tests.train.test_batches import prepared
from tests.train.test_exactness import assert_agree, gradients
from tests.train.test_training_plan import MACHINE, SHAPE


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_lanes(objective: Any, units: Any, model: Any, count: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outcomes = Lanes(count, trained).backward(objective.losses(units, training=True))
    return sum(outcome.loss for outcome in outcomes), gradients(model)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", ["supervised", "dpo", "kto", "orpo", "reward"])
def test_two_lanes_give_the_loss_and_gradient_of_one(tiny_base: Path, tmp_path: Path, method: str) -> None:
    objective, units, model = prepared(method, tiny_base, tmp_path)
    objective.tokens_per_row = 16
    assert len(objective.losses(units, training=True)) > LANES
    one, two = (in_lanes(objective, units, model, count) for count in (1, 2))
    assert_agree(two, one)
    again = in_lanes(objective, units, model, 2)
    assert again[0] == two[0]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in two[1].items())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [1, 2])
def test_the_optimizer_moves_every_weight_against_its_gradient(tiny_base: Path, tmp_path: Path, count: int) -> None:
    # A fused optimizer reads a gradient as it lies in memory: a view of a larger one is other numbers to it.
    objective, units, model = prepared("supervised", tiny_base, tmp_path)
    objective.tokens_per_row = 16
    _, wanted = in_lanes(objective, units, model, count)
    groups = parameter_groups(model, 1e-3, 0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_optimizer("adamw", groups).step()
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    for name, gradient in wanted.items():
        learned = gradient.abs() > 1e-7
        assert torch.equal(moved[name][learned].sign(), -gradient[learned].sign()), name


@pytest.mark.usefixtures("two_threads")
def test_outcomes_keep_the_order_of_the_parts_and_threads_their_number(tiny_base: Path, tmp_path: Path) -> None:
    objective, units, model = prepared("supervised", tiny_base, tmp_path)
    objective.tokens_per_row = 16
    parts = objective.losses(units, training=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = Lanes(2, trained).backward(parts)
    expected = list(forward(parts))
    assert [outcome.sums for outcome in found] == [outcome.sums for outcome in expected]
    assert [outcome.loss for outcome in found] == pytest.approx([outcome.loss for outcome in expected], rel=1e-5)
    assert torch.get_num_threads() == 2


def test_an_error_in_a_lane_is_raised(tiny_base: Path, tmp_path: Path) -> None:
    objective, units, model = prepared("supervised", tiny_base, tmp_path)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def broken() -> Any:
        raise ValueError("no loss here")

    with pytest.raises(ValueError, match="no loss here"):
        Lanes(2, trained).backward([*objective.losses(units, training=True), broken])


def example(length: int) -> TokenizedExample:
    return TokenizedExample("e", list(range(length)), [False] * (length - 1) + [True])


def test_rows_of_several_lanes_are_of_similar_length_and_share_the_tokens() -> None:
    examples = [example(length) for length in (90, 10, 50, 40, 70, 60, 30, 20)]
    rows = pack(examples, 4, 400, lanes=2)
    assert len(rows) == 2
    assert abs(len(rows[0].tokens) - len(rows[1].tokens)) <= 20
    assert sorted(index for row in rows for index in row.examples) == list(range(8))
    many = pack(examples, 4, 200, lanes=2)
    assert len(many) % 2 == 0
    assert all(len(row.tokens) <= 100 for row in many)
    few = [example(LEAST_IN_LANE // 2) for _ in range(2)]
    assert len(pack(few, 4, 400, lanes=2)) == 1


def plan(longest: int = 20, **changes: Any) -> TrainingPlan:
    config = {"method": "supervised", "tokens_per_row": 64, "max_tokens": 64, **changes}
    examples = [example(longest) for _ in range(8)]
    material = Material(examples, [], RenderReport())
    return plan_training(material, TrainingConfig.model_validate(config), SHAPE, MACHINE)


@pytest.mark.usefixtures("two_threads")
def test_there_is_one_lane_where_two_would_change_numbers_or_take_more_memory() -> None:
    here = torch.device("cpu")
    assert lane_count(plan(), here) == LANES
    assert lane_count(plan(40), here) == 1
    assert lane_count(plan(mode="full"), here) == 1
    assert lane_count(plan(lora_dropout=0.1), here) == 1
    assert lane_count(plan(supervised={"neftune_alpha": 5}), here) == 1
    assert lane_count(plan(), torch.device("cuda")) == 1
    assert lane_count(plan(), here, LlamaConfig()) == LANES
    assert lane_count(plan(), here, BertConfig()) == 1  # it has dropouts of its own
    torch.set_num_threads(1)
    assert lane_count(plan(), here) == 1


def test_supervised_asks_for_as_many_rows_as_there_are_lanes(tiny_base: Path, tmp_path: Path) -> None:
    objective, units, _ = prepared("supervised", tiny_base, tmp_path)
    assert isinstance(objective, Supervised)
    objective.tokens_per_row = 4096
    long = [unit for unit in units for _ in range(8)]
    assert len(objective.losses(long, training=True)) == 1
    objective.lanes = 2
    assert len(objective.losses(long, training=True)) == 2
