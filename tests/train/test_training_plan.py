"""Plans: derived hyperparameters with reasons, and what is refused before it starts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from luthier.errors import CapacityError, InputError
from luthier.records.base_model import Machine, ModelShape
from luthier.records.training import TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.plan import Material, plan_training

SHAPE = ModelShape(
    layers=30,
    width=576,
    intermediate=1536,
    heads=9,
    key_heads=3,
    vocabulary=49152,
    context_length=8192,
    parameters=134_515_008,
)
MACHINE = Machine(cores=2, memory_bytes=24 * 10**9, has_fast_bfloat16=True, matmul_flops=7e11)


def examples(count: int, length: int = 40) -> list[TokenizedExample]:
    mask = [False] * (length - 2) + [True, True]
    return [TokenizedExample(str(i), [1, 2, 3, 4, *[10 + i % 50] * (length - 4)], mask) for i in range(count)]


def make_plan(count: int, machine: Machine = MACHINE, shape: ModelShape = SHAPE, **options: object) -> TrainingPlan:
    config = TrainingConfig.model_validate(options)
    return plan_training(Material(examples(count), examples(5), RenderReport()), config, shape, machine)


def test_every_derived_value_has_a_reason() -> None:
    reasons = {reason.name: reason for reason in make_plan(200).reasons}
    assert {"epochs", "batch size", "learning rate", "LoRA rank", "LoRA alpha", "precision"} <= set(reasons)
    assert all(reason.reason for reason in reasons.values())


@pytest.mark.parametrize(("count", "epochs"), [(20, 10), (300, 5), (1500, 1), (100_000, 1)])
def test_fewer_examples_are_passed_over_more_often(count: int, epochs: int) -> None:
    assert make_plan(count).resolved.epochs == epochs


def test_a_wider_model_learns_with_a_smaller_rate() -> None:
    wide = SHAPE.model_copy(update={"width": 4 * SHAPE.width})
    assert make_plan(1500, shape=wide).resolved.learning_rate == pytest.approx(
        make_plan(1500).resolved.learning_rate / 2
    )


def test_given_values_are_used_as_they_are() -> None:
    resolved = make_plan(100, epochs=3, batch_size=8, learning_rate=1e-4, lora_rank=4, precision="float32").resolved
    assert (resolved.epochs, resolved.batch_size, resolved.learning_rate) == (3, 8, 1e-4)
    assert (resolved.lora_rank, resolved.precision) == (4, "float32")


def test_the_multiplier_scales_the_derived_learning_rate() -> None:
    assert make_plan(100, learning_rate_multiplier=0.5).resolved.learning_rate == pytest.approx(
        make_plan(100).resolved.learning_rate / 2
    )


def test_precision_follows_the_machine() -> None:
    slow = MACHINE.model_copy(update={"has_fast_bfloat16": False})
    assert make_plan(50, slow).resolved.precision == "float32"
    assert make_plan(50).resolved.precision == "bfloat16"


def test_steps_cover_all_passes() -> None:
    plan = make_plan(100, epochs=2, batch_size=16)
    assert plan.steps == 13  # 200 visits in batches of 16


def test_what_cannot_fit_is_refused_with_what_to_lower() -> None:
    small = MACHINE.model_copy(update={"memory_bytes": 10**9})
    with pytest.raises(CapacityError, match="needs about") as refused:
        make_plan(100, small, tokens_per_row=16_384)
    assert "tokens_per_row" in (refused.value.hint or "")


def test_one_example_is_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        make_plan(1)


def test_shared_tokens_are_computed_once_a_row() -> None:
    plan = make_plan(64)
    assert plan.shared_prefix == 4
    assert plan.computed_tokens_per_epoch < plan.tokens_per_epoch


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"epochs": 0}, {"learning_rate": -1}, {"lora_rank": 0}, {"last_layers": 0}]
)
def test_numbers_that_make_no_sense_are_refused_where_they_are_given(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig.model_validate(options)
