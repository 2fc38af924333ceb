"""Plans: derived hyperparameters with reasons, and what is refused before it starts."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.errors import CapacityError, InputError
from luthier.llm.rows import pack
from luthier.records.base_model import Machine, ModelShape
from luthier.records.objectives import KtoOptions
from luthier.records.training import Measured, TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample, TokenizedPair
from luthier.train.plan import (
    SECONDS_TO_START,
    Material,
    computed_tokens,
    plan_training,
    smaller,
    validations,
    with_measured,
)

SHAPE = ModelShape(
    layers=30,
    width=576,
    intermediate=1536,
    heads=9,
    key_heads=3,
    vocabulary=49152,
    context_length=8192,
    parameters=134_515_008,
    fused=True,
)
EIGHT_BILLION = ModelShape(
    layers=32,
    width=4096,
    intermediate=14336,
    heads=32,
    key_heads=8,
    vocabulary=128_256,
    context_length=8192,
    parameters=8_030_261_248,
    fused=True,
)
MACHINE = Machine(cores=2, memory_bytes=24 * 10**9, has_fast_bfloat16=True, matmul_flops=7e11)


def examples(count: int, length: int = 40) -> list[TokenizedExample]:
    mask = [False] * (length - 2) + [True, True]
    return [TokenizedExample(str(i), [1, 2, 3, 4, *[10 + i % 50] * (length - 4)], mask) for i in range(count)]


def make_plan(
    count: int,
    machine: Machine = MACHINE,
    shape: ModelShape = SHAPE,
    length: int = 40,
    *,
    proven: bool = False,
    **options: object,
) -> TrainingPlan:
    config = TrainingConfig.model_validate(options)
    material = Material(examples(count, length), examples(5, length), RenderReport(), proven=proven)
    return plan_training(material, config, shape, machine)


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


def test_the_multiplier_scales_a_given_learning_rate_too() -> None:
    plan = make_plan(100, learning_rate=1e-3, learning_rate_multiplier=0.3)
    assert plan.resolved.learning_rate == pytest.approx(3e-4)
    said = {value.name: value.reason for value in plan.reasons}["learning rate"]
    assert said == "given, times 0.3 (learning_rate_multiplier)"


@pytest.mark.parametrize(
    ("mode", "rank", "scale"), [("lora", 16, 2), ("lora", 64, 2), ("rslora", 16, 2), ("rslora", 64, 1)]
)
def test_the_derived_alpha_suits_how_a_mode_scales(mode: str, rank: int, scale: float) -> None:
    resolved = make_plan(100, mode=mode, lora_rank=rank).resolved
    assert resolved.lora_alpha / (math.sqrt(rank) if mode == "rslora" else rank) == scale


def test_precision_follows_the_machine() -> None:
    slow = MACHINE.model_copy(update={"has_fast_bfloat16": False})
    assert make_plan(50, slow).resolved.precision == "float32"
    assert make_plan(50).resolved.precision == "bfloat16"


def test_a_precision_that_was_timed_says_what_was_seen() -> None:
    slow = MACHINE.model_copy(update={"has_fast_bfloat16": False, "bfloat16_speed": 0.5})
    reasons = {value.name: value.reason for value in make_plan(50, slow).reasons}
    assert "multiplies bfloat16 at 0.50 times float32's rate (it is taken from 0.8 on" in reasons["precision"]


def test_integers_are_told_of_where_they_are_fast_and_refused_where_they_are_not_exact() -> None:
    fast = MACHINE.model_copy(update={"has_fast_bfloat16": False, "int8_speed": 3.9})
    said = {value.name: value.reason for value in make_plan(50, fast).reasons}["precision"]
    assert "precision=int8 would multiply the frozen base 3.9 times as fast" in said
    plan = make_plan(50, fast, precision="int8")
    said = {value.name: value.reason for value in plan.reasons}["precision"]
    assert "given; it multiplies the frozen base 3.9 times as fast as float32" in said
    narrow = MACHINE.model_copy(update={"bfloat16_speed": 3.0, "int8_speed": 3.9})  # not worth its rounding there
    assert not any("int8" in value.reason for value in make_plan(50, narrow).reasons)
    assert plan.resolved.precision == "int8"
    assert plan.memory_bytes < make_plan(50, fast).memory_bytes
    with pytest.raises(InputError, match=r"precision=int8 is for processors that add .* exactly; .* \(cpu\) does not"):
        make_plan(50, precision="int8")


def test_steps_cover_all_passes() -> None:
    plan = make_plan(100, epochs=2, batch_size=16)
    assert plan.steps == 13  # 200 visits in batches of 16


def refusal(memory_bytes: int, length: int = 40, shape: ModelShape = SHAPE, **options: object) -> str:
    """Return the hint that comes with a refusal."""
    small = MACHINE.model_copy(update={"memory_bytes": memory_bytes})
    with pytest.raises(CapacityError, match="needs about") as refused:
        make_plan(100, small, shape, length, **options)
    return refused.value.hint or ""


@pytest.mark.parametrize(
    ("memory_bytes", "length", "shape", "options"),
    [
        (1_600_000_000, 40, SHAPE, {"tokens_per_row": 16_384}),
        (1_600_000_000, 40, SHAPE, {"tokens_per_row": 16_384, "recompute": False}),
        (1_400_000_000, 4_000, SHAPE, {}),
        (1_400_000_000, 900, SHAPE, {"method": "raw_text"}),
        (12_000_000_000, 40, EIGHT_BILLION, {}),
        (11_000_000_000, 2_000, EIGHT_BILLION, {"mode": "qlora", "base_bits": 8}),
        (30_000_000_000, 40, EIGHT_BILLION, {"mode": "full"}),
        (40_000_000_000, 40, EIGHT_BILLION, {"mode": "last_layers"}),
        (30_000_000_000, 40, EIGHT_BILLION, {"precision": "float32"}),
    ],
)
def test_each_way_to_fit_that_a_refusal_names_does_fit(
    memory_bytes: int, length: int, shape: ModelShape, options: dict[str, object]
) -> None:
    ways = refusal(memory_bytes, length, shape, **options).split(", or ")
    for way in ways:
        named = dict(re.findall(r"(\w+)=(\w+)", way))
        assert named
        named.pop("too_long", None)
        longest = int(named.get("max_tokens", length))
        changed = options | {name: int(value) if value.isdigit() else value for name, value in named.items()}
        if "mode" in named:
            changed = {name: value for name, value in changed.items() if name not in ("base_bits", "last_layers")}
        machine = MACHINE.model_copy(update={"memory_bytes": memory_bytes})
        assert make_plan(100, machine, shape, min(length, longest), **changed).memory_bytes <= memory_bytes


def test_numbers_are_narrowed_where_float32_does_not_fit() -> None:
    slow = {"has_fast_bfloat16": False, "bfloat16_speed": 0.5, "memory_bytes": 30_000_000_000}
    machine = MACHINE.model_copy(update=slow)
    plan = make_plan(100, machine, EIGHT_BILLION)
    assert plan.resolved.precision == "bfloat16"
    assert "half of float32's memory, at 0.50 times its rate, to fit the memory" in [why.reason for why in plan.reasons]
    with pytest.raises(CapacityError) as refused:
        make_plan(100, machine, EIGHT_BILLION, precision="float32")
    assert "set precision=bfloat16" in (refused.value.hint or "")


def test_where_weights_alone_are_too_large_no_shorter_rows_are_promised() -> None:
    hint = refusal(12_000_000_000, 2_000, EIGHT_BILLION)
    assert hint == "use mode=qlora"


def test_where_no_option_helps_the_refusal_names_the_base_that_would_fit() -> None:
    hint = refusal(6_000_000_000, 2_000, EIGHT_BILLION)
    assert "no option makes it fit" in hint
    billions = float(re.findall(r"less than ([\d.]+) billion", hint)[0])
    share = 0.95 * billions * 1e9 / EIGHT_BILLION.parameters
    # Less of everything that a base's memory grows with.
    smaller = EIGHT_BILLION.model_copy(
        update={
            "layers": int(32 * share),
            "vocabulary": int(128_256 * share),
            "parameters": int(EIGHT_BILLION.parameters * share),
        }
    )
    machine = MACHINE.model_copy(update={"memory_bytes": 6_000_000_000})
    assert make_plan(100, machine, smaller, 64, mode="qlora", recompute=True).memory_bytes <= 6_000_000_000


def test_a_proof_that_main_memory_cannot_hold_is_refused_before_the_training() -> None:
    machine = MACHINE.model_copy(update={"device": "cuda", "main_memory_bytes": 12_000_000_000})
    with pytest.raises(CapacityError, match="main memory") as refused:
        make_plan(20, machine, EIGHT_BILLION, mode="qlora", proven=True)
    assert "parity_prompts" in (refused.value.hint or "")
    assert make_plan(20, machine, EIGHT_BILLION, mode="qlora").main_memory_bytes < 6_000_000_000
    shy = machine.model_copy(update={"main_memory_bytes": 2_000_000_000})
    with pytest.raises(CapacityError) as refused:
        make_plan(20, shy, EIGHT_BILLION, mode="qlora", proven=True)
    assert "parity_prompts" not in (refused.value.hint or "")


def test_layers_that_do_not_run_fused_need_more() -> None:
    fused = make_plan(100).memory_bytes
    assert make_plan(100, shape=SHAPE.model_copy(update={"fused": False})).memory_bytes > fused
    assert make_plan(100, mode="dora").memory_bytes > make_plan(100, lora_dropout=0.1).memory_bytes > 1.2 * fused


def test_a_head_of_its_own_counts_among_the_last_layers() -> None:
    untied = SHAPE.model_copy(update={"parameters": SHAPE.parameters + 49_152 * 576})
    more = (
        make_plan(100, shape=untied, mode="last_layers").memory_bytes - make_plan(100, mode="last_layers").memory_bytes
    )
    assert more == pytest.approx(49_152 * 576 * (4 + 4 + 8), rel=0.01)


def test_the_data_set_counts_where_the_steps_are_computed() -> None:
    short, long = (make_plan(2_000, length=length, tokens_per_row=1_000) for length in (40, 400))
    assert long.memory_bytes - short.memory_bytes == long.data_bytes - short.data_bytes > 30_000_000
    card = MACHINE.model_copy(update={"device": "cuda", "main_memory_bytes": 10**11})
    assert (
        make_plan(200, card, tokens_per_row=1_000).memory_bytes
        == make_plan(200, card, length=400, tokens_per_row=1_000).memory_bytes
    )


def test_a_row_has_room_for_the_longest_example_of_every_side() -> None:
    plan = plan_training(
        Material(examples(50), examples(5, 1_500), RenderReport(), test=examples(3, 2_500)),
        TrainingConfig(),
        SHAPE,
        MACHINE,
    )
    assert plan.longest_example == plan.resolved.tokens_per_row == 2_500


# What is not learned takes time too


def passes(plan: TrainingPlan) -> dict[str, int]:
    return {
        reason.name: int(reason.value.split()[0].replace(",", ""))
        for reason in plan.reasons
        if reason.value.endswith(" tokens")
    }


def test_validations_sample_answers_and_the_test_are_in_the_time() -> None:
    config = TrainingConfig(epochs=2, batch_size=8)
    bare = Material(examples(40), [], RenderReport())
    full = replace(bare, validation=examples(8), test=examples(16), sample_prompts=[30, 50], sample_tokens=10)
    without, found = (plan_training(material, config, SHAPE, MACHINE) for material in (bare, full))
    assert without.forward_tokens == 0

    def computed(side: Sequence[Any]) -> int:
        return sum(len(row.tokens) for row in pack(side, found.resolved.tokens_per_row))  # a whole side at once

    assert passes(found) == {
        "validation": 4 * computed(full.validation),
        "test": computed(full.test),
        "sample answers": 4 * (80 + 2 * 10),
    }
    assert found.forward_tokens == sum(passes(found).values())
    learned = without.seconds - SECONDS_TO_START
    share = 0.5 * found.forward_tokens / (2 * found.computed_tokens_per_epoch)
    assert found.seconds - SECONDS_TO_START == pytest.approx(learned * (1 + share), rel=0.05, abs=0.11)


def test_the_reference_of_preferences_is_in_the_time() -> None:
    (plain,) = examples(1)
    pairs = [TokenizedPair(str(i), plain, replace(plain, tokens=[*plain.tokens[:-1], 99])) for i in range(24)]
    material = Material(pairs[:20], pairs[20:], RenderReport())
    plan = plan_training(material, TrainingConfig(method="dpo", validations=1), SHAPE, MACHINE)
    assert passes(plan)["reference"] == plan.computed_tokens_per_epoch + passes(plan)["validation"]


def test_the_drift_of_thumbs_is_in_the_time() -> None:
    thumbs = [replace(example, label=float(i % 2)) for i, example in enumerate(examples(20))]
    plan = plan_training(Material(thumbs, [], RenderReport()), TrainingConfig(method="kto"), SHAPE, MACHINE)
    learned = plan.computed_tokens_per_epoch
    asked = sum(len(thumb.tokens) + sum(thumb.loss_mask) for thumb in thumbs)  # each prompt once, for two answers
    assert passes(plan) == {"reference": asked, "drift": int(plan.resolved.epochs) * learned}


def test_neighbours_that_share_more_than_others_do_not_make_a_plan_shorter() -> None:
    some = examples(16)
    copies = [replace(one, example_id=f"{one.example_id}-{i}") for one in some for i in range(8)]
    resolved = make_plan(16, batch_size=8).resolved
    shuffled = random.Random(0).sample(copies, len(copies))
    found, expected = (computed_tokens(units, resolved, share=True) for units in (copies, shuffled))
    assert found == pytest.approx(expected, rel=0.02)


def test_measured_steps_of_thumbs_have_their_drift_in_them() -> None:
    thumbs = [replace(example, label=float(i % 2)) for i, example in enumerate(examples(20))]
    plan = plan_training(Material(thumbs, [], RenderReport()), TrainingConfig(method="kto"), SHAPE, MACHINE)
    learned = plan.computed_tokens_per_epoch
    found = with_measured(plan, Measured(tokens=learned, seconds=150.0, peak_bytes=10**9))
    # Of 150 seconds a pass 100 are steps and 50 the drift: a token that is not learned takes half of one that is.
    reference = 50 * passes(plan)["reference"] / learned
    assert found.seconds == pytest.approx(SECONDS_TO_START + 150 * plan.resolved.epochs + reference, rel=1e-3)


def test_thumbs_share_what_their_prompts_share() -> None:
    thumbs = [replace(example, label=float(i % 2)) for i, example in enumerate(examples(64))]
    plan = plan_training(Material(thumbs, [], RenderReport()), TrainingConfig(method="kto"), SHAPE, MACHINE)
    assert plan.shared_prefix == 4
    assert plan.computed_tokens_per_epoch < plan.tokens_per_epoch


def test_numbers_that_had_to_be_changed_say_so() -> None:
    plan = make_plan(3, length=40, batch_size=16, tokens_per_row=20, mode="last_layers", last_layers=500)
    found = {reason.name: (reason.value, reason.reason) for reason in plan.reasons}
    assert found["batch size"] == ("3", "16 (given) is cut to the examples that there are")
    assert found["tokens per row"] == (str(plan.longest_example), "20 (given) is raised to the longest example")
    assert found["last layers"] == (str(SHAPE.layers), "500 (given) is cut to all layers")


def test_what_does_not_fit_gives_up_rows_then_time_then_numbers() -> None:
    slow = MACHINE.model_copy(update={"has_fast_bfloat16": False, "bfloat16_speed": 0.5})
    resolved, given_up = make_plan(8, slow).resolved, []
    while (less := smaller(resolved, TrainingConfig(), 300, slow)) is not None:
        resolved, reason = less
        given_up.append((reason.name, reason.value))
    rows = [("tokens per row", "512"), ("tokens per row", "300")]
    assert given_up == [*rows, ("recompute", "yes"), ("precision", "bfloat16")]
    assert smaller(resolved, TrainingConfig(tokens_per_row=1024, recompute=False), 300, slow) is None


@pytest.mark.parametrize(
    ("likes", "given", "weights"),
    [
        (6, {}, (3.0, 1.0)),
        (18, {}, (1.0, 3.0)),
        (6, {"desirable_weight": 1.5}, (1.5, 0.5)),
        (18, {"undesirable_weight": 6.0}, (2.0, 6.0)),
        (6, {"desirable_weight": 1.5, "undesirable_weight": 1.0}, (1.5, 1.0)),
    ],
)
def test_the_rarer_kind_of_thumbs_counts_as_much(
    likes: int, given: dict[str, float], weights: tuple[float, float]
) -> None:
    thumbs = [replace(example, label=float(i < likes)) for i, example in enumerate(examples(24))]
    config = TrainingConfig(method="kto", kto=KtoOptions(**given))
    plan = plan_training(Material(thumbs, [], RenderReport()), config, SHAPE, MACHINE)
    assert (plan.resolved.kto.desirable_weight, plan.resolved.kto.undesirable_weight) == weights
    assert {"weight of thumbs up", "weight of thumbs down"} <= {reason.name for reason in plan.reasons}


def test_thumbs_count_by_the_weights_of_their_examples() -> None:
    weights = [2.0] * 6 + [0.0] * 12 + [1.0] * 6
    thumbs = [replace(one, label=float(i < 6), weight=weights[i]) for i, one in enumerate(examples(24))]
    plan = plan_training(Material(thumbs, [], RenderReport()), TrainingConfig(method="kto"), SHAPE, MACHINE)
    assert (plan.resolved.kto.desirable_weight, plan.resolved.kto.undesirable_weight) == (1.0, 2.0)


def test_a_validation_at_the_end_of_each_pass_counts_once() -> None:
    resolved = make_plan(100, epochs=3, batch_size=10, validations=3).resolved  # 30 steps, validated after 10, 20, 30
    assert validations(resolved, 30, 100, epoch_weights=True) == 3
    assert validations(resolved, 30, 100, epoch_weights=False) == 3
    uneven = resolved.model_copy(update={"validate_every": 7})
    assert validations(uneven, 30, 100, epoch_weights=False) == 5  # 7, 14, 21, 28, 30
    assert validations(uneven, 30, 100, epoch_weights=True) == 7  # and 10, 20


# Rules


@pytest.mark.parametrize(("steps", "looks", "saved"), [(7, 4, 7), (15, 4, 8), (75, 4, 10), (3, 3, 3), (9, 3, 9)])
def test_there_are_no_more_validations_and_checkpoints_than_meant(steps: int, looks: int, saved: int) -> None:
    plan = make_plan(steps * 8, epochs=1, batch_size=8)
    assert plan.steps == steps
    resolved = plan.resolved
    assert math.ceil(steps / resolved.validate_every) == looks
    assert math.ceil(steps / resolved.checkpoint_every) == saved


def test_long_answers_need_fewer_passes_and_smaller_batches() -> None:
    def learned(count: int, length: int) -> TrainingPlan:
        units = [replace(one, loss_mask=[False] * 4 + [True] * (length - 4)) for one in examples(count, length)]
        return plan_training(Material(units, [], RenderReport()), TrainingConfig(), SHAPE, MACHINE)

    short, long = learned(300, 40), learned(300, 2_000)
    assert (short.resolved.epochs, long.resolved.epochs) == (5, 1)
    assert (learned(1_000, 20).resolved.batch_size, learned(1_000, 1_500).resolved.batch_size) == (16, 8)
    assert "learned tokens" in next(reason.reason for reason in long.reasons if reason.name == "epochs")


def test_an_adapter_has_room_for_what_there_is_to_learn() -> None:
    tiny = SHAPE.model_copy(update={"layers": 1, "width": 36, "intermediate": 96})
    assert [make_plan(count, shape=tiny).resolved.lora_rank for count in (50, 15_000, 40_000)] == [16, 32, 64]


def test_the_plan_of_the_demo_stays_as_it_was() -> None:
    resolved = make_plan(1_206, length=56).resolved
    assert (resolved.epochs, resolved.batch_size, resolved.lora_rank, resolved.tokens_per_row) == (1, 16, 16, 1_024)


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


def test_smoothing_has_no_effect_on_ipo_and_is_refused() -> None:
    with pytest.raises(ValidationError, match="label_smoothing would have no effect with loss=ipo"):
        TrainingConfig.model_validate({"method": "dpo", "dpo": {"loss": "ipo", "label_smoothing": 0.1}})
    TrainingConfig.model_validate({"method": "dpo", "dpo": {"label_smoothing": 0.1}})


def test_examples_share_no_prefix_in_a_model_that_takes_no_rows_of_their_length() -> None:
    for limit, prefix in ((0, 0), (4095, 0), (4096, 4)):
        plan = make_plan(64, shape=SHAPE.model_copy(update={"rows_up_to": limit}))
        assert (plan.resolved.max_tokens, plan.shared_prefix) == (4096, prefix)
        assert ("batches" in {reason.name for reason in plan.reasons}) == (prefix == 0)
