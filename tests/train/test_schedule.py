"""The learning rate rises in the warm-up and then falls, or stays, as its schedule says."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.records.training import Resolved
from luthier.train.schedule import LEAST_FACTOR, rate_factor

STEPS = 104


def factors(schedule: Any, warmup_steps: int = 4) -> list[float]:
    resolved = Resolved(
        epochs=1,
        batch_size=1,
        learning_rate=1,
        warmup_steps=warmup_steps,
        schedule=schedule,
        lora_rank=1,
        lora_alpha=1,
        lora_dropout=0,
        weight_decay=0,
        max_gradient_norm=1,
        max_tokens=2,
        tokens_per_row=2,
        validate_every=1,
        checkpoint_every=1,
        precision="float32",
        seed=0,
    )
    return [rate_factor(step, STEPS, resolved) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_in_even_steps_to_its_peak(schedule: str) -> None:
    found = factors(schedule)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert max(found) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_a_warm_up_the_first_step_has_the_whole_rate(schedule: str) -> None:
    assert factors(schedule, warmup_steps=0)[0] == 1.0


def test_a_constant_rate_stays() -> None:
    assert set(factors("constant")[4:]) == {1.0}


def test_a_linear_rate_falls_by_the_same_at_each_step() -> None:
    assert factors("linear")[4:] == pytest.approx([1 - step / 100 for step in range(100)])


def test_a_cosine_falls_slowly_at_both_ends_and_is_at_half_in_the_middle() -> None:
    found = factors("cosine")[4:]
    assert found[50] == pytest.approx(0.5)
    assert found[25] == pytest.approx(0.5 + 0.5 / 2**0.5)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_last_step_still_learns_something(schedule: str) -> None:
    assert LEAST_FACTOR <= factors(schedule)[-1] < 0.02
    assert min(factors(schedule, warmup_steps=STEPS)) > 0
