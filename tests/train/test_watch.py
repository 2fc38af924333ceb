"""The judge of a run, on made-up histories: every rule, what must not trip it, a history saved and taken up again."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator

import pytest

from luthier.train.watch import LossHistory, Warning

STEPS = 200
Curve = Callable[[int], float]


def healthy(step: int) -> float:
    """Fall from 2.2 to 0.7, as a share of the steps."""
    return 0.7 + 1.5 * math.exp(-4 * step / STEPS)


def watch(
    history: LossHistory,
    train: Curve,
    valid: Curve | None = None,
    norm: Curve = lambda step: 1.0,
    noise: float = 0.0,
    seed: int = 0,
    every: int = 20,
    until: int | None = None,
) -> Iterator[Warning]:
    """Feed a run with losses that are noisy by a share of themselves; yield its warnings as they come."""
    chance = random.Random(seed)

    def noisy(value: float, share: float) -> float:
        return value * math.exp(chance.gauss(-share * share / 2, share))

    for step in range(history.step + 1, (until or history.steps) + 1):
        history.training(step, noisy(train(step), noise), noisy(norm(step), noise))
        if valid and step % every == 0:
            history.validation(step, noisy(valid(step), noise / 30))
        yield from history.warnings()


def warnings(*args: Curve, steps: int = STEPS, **options: object) -> list[Warning]:
    return list(watch(LossHistory(steps), *args, **options))  # type: ignore[arg-type]


def kinds(found: list[Warning]) -> list[str]:
    return [warning.kind for warning in found]


@pytest.mark.parametrize("seed", range(40))
def test_a_healthy_run_with_noisy_losses_warns_of_nothing(seed: int) -> None:
    assert warnings(healthy, healthy, noise=0.4, seed=seed) == []


def test_a_short_run_with_very_noisy_losses_is_hardly_ever_said_to_diverge() -> None:
    def fall(step: int) -> float:
        return healthy(4 * step)

    found = [warnings(fall, fall, steps=50, noise=0.5, seed=seed) for seed in range(100)]
    assert sum(map(bool, found)) <= 3


@pytest.mark.parametrize("steps", [1, 3, 9, 12, 25, 1500])
@pytest.mark.parametrize("seed", range(5))
def test_short_and_long_healthy_runs_warn_of_nothing(steps: int, seed: int) -> None:
    def fall(step: int) -> float:
        return healthy(step * STEPS // steps)

    assert warnings(fall, fall, steps=steps, noise=0.2, seed=seed, every=max(1, steps // 8)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_learns_its_task_to_the_end_is_not_diverging_where_single_batches_still_err(seed: int) -> None:
    chance = random.Random(seed)

    def nearly_nothing(step: int) -> float:
        return 2 * math.exp(-8 * step / STEPS) + (0.5 if chance.random() < 0.05 else 0.001)

    assert kinds(warnings(nearly_nothing)) == []


def test_overfitting_is_told_with_the_best_step_and_both_losses() -> None:
    def valid(step: int) -> float:
        return 1.0 + 0.4 * abs(step / STEPS - 0.4)

    (found,) = warnings(healthy, valid, noise=0.1, seed=1)
    assert found.kind == "overfitting"
    assert 100 <= found.step <= 140
    assert "from 1.0" in found.message
    assert "at step 80" in found.message
    assert "fewer epochs" in found.hint


def test_one_validation_a_little_worse_is_not_overfitting() -> None:
    def valid(step: int) -> float:
        return healthy(step) * (1.08 if step == 180 else 1.0)

    assert warnings(healthy, valid) == []


def test_one_validation_much_worse_is_overfitting() -> None:
    def valid(step: int) -> float:
        return healthy(step) * (1.2 if step == 180 else 1.0)

    assert [(w.kind, w.step) for w in warnings(healthy, valid)] == [("overfitting", 180)]


def test_the_last_validation_needs_no_second_to_confirm_it() -> None:
    def valid(step: int) -> float:
        return healthy(step) * (1.06 if step == STEPS else 1.0)

    assert [(w.kind, w.step) for w in warnings(healthy, valid)] == [("overfitting", STEPS)]


def test_a_rise_that_the_training_loss_shares_is_not_overfitting() -> None:
    def both(step: int) -> float:
        return 2 - 0.9 * step / 100 if step <= 100 else 1.1 + 0.3 * (step - 100) / 100

    assert kinds(warnings(both, both)) == []


def test_a_rise_of_a_validation_loss_next_to_zero_is_not_overfitting() -> None:
    def valid(step: int) -> float:
        return 0.01 if step <= 60 else 0.013

    assert kinds(warnings(healthy, valid)) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_climbing_training_loss_is_diverging(seed: int) -> None:
    def climbing(step: int) -> float:
        return healthy(step) if step <= 100 else healthy(100) * 1.02 ** (step - 100)

    found = warnings(climbing, noise=0.2, seed=seed)
    assert kinds(found) == ["diverging"]
    assert 115 <= found[0].step <= 160
    assert "times the best" in found[0].message
    assert "learning_rate_multiplier" in found[0].hint


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_diverging_at_once(loss: float) -> None:
    history = LossHistory(STEPS)
    history.training(1, 2.0, 1.0)
    history.training(2, loss, 1.0)
    (found,) = history.warnings()
    assert (found.kind, found.step) == ("diverging", 2)
    assert "left out" in found.message
    json.dumps(history.state(), allow_nan=False)


def test_a_validation_loss_that_is_no_number_is_diverging() -> None:
    history = LossHistory(STEPS)
    history.training(1, 2.0, 1.0)
    history.validation(1, math.nan)
    assert kinds(history.warnings()) == ["diverging"]
    json.dumps(history.state(), allow_nan=False)


@pytest.mark.parametrize("seed", range(10))
def test_a_flat_training_loss_is_learning_nothing(seed: int) -> None:
    found = warnings(lambda step: 2.0, lambda step: 2.0, noise=0.02, seed=seed)
    assert kinds(found) == ["learning_nothing"]
    assert found[0].step >= 60
    assert f"of {STEPS} steps" in found[0].message
    assert "labels" in found[0].hint


def test_learning_nothing_is_not_told_before_three_tenths_of_the_steps() -> None:
    (found,) = warnings(lambda step: 2.0)
    assert found.step == 60


def test_learning_nothing_is_not_told_in_the_shortest_runs() -> None:
    assert warnings(lambda step: 2.0, steps=13) == []
    assert kinds(warnings(lambda step: 2.0, steps=20)) == ["learning_nothing"]


def test_learning_nothing_waits_for_a_second_validation_where_there_was_one() -> None:
    (found,) = warnings(lambda step: 2.0, lambda step: 2.0, every=50)
    assert found.step == 100


def test_noise_that_could_hide_a_fall_is_not_taken_for_learning_nothing() -> None:
    found = [warnings(lambda step: 2.0 - 0.4 * step / 50, steps=50, noise=0.2, seed=seed) for seed in range(100)]
    assert sum(map(bool, found)) <= 15


def test_noise_that_hides_a_fall_does_not_count_where_the_validation_loss_falls() -> None:
    assert warnings(lambda step: 2.0, lambda step: 2.0 - step / STEPS) == []


def test_gradients_that_leap_again_and_again_are_unstable() -> None:
    found = warnings(healthy, norm=lambda step: 30.0 if step in (90, 95, 99) else 1.0, noise=0.2)
    assert [(w.kind, w.step) for w in found] == [("unstable_gradients", 99)]
    assert "90, 95, 99" in found[0].message
    assert "10 times" in found[0].message


def test_leaps_of_the_gradient_that_are_few_or_far_apart_are_not_unstable() -> None:
    assert warnings(healthy, norm=lambda step: 50.0 if step in (50, 90, 95, 150) else 1.0) == []


def test_late_gradients_that_leap_to_where_they_began_are_not_unstable() -> None:
    def norm(step: int) -> float:
        return 2.0 * math.exp(-8 * step / STEPS) + (0.9 if step % 7 == 0 else 0.0)

    assert warnings(healthy, norm=norm) == []


def test_a_gradient_that_is_no_number_is_unstable_at_once() -> None:
    found = warnings(healthy, norm=lambda step: math.inf if step == 20 else 1.0)
    assert [(warning.kind, warning.step) for warning in found] == [("unstable_gradients", 20)]
    assert "left out" in found[0].message


def test_every_warning_is_told_once() -> None:
    history = LossHistory(STEPS)
    assert kinds(list(watch(history, lambda step: 2.0))) == ["learning_nothing"]
    assert history.warnings() == []


def test_a_history_taken_up_from_json_judges_as_the_one_that_went_on() -> None:
    def valid(step: int) -> float:
        return 1.0 + abs(step / STEPS - 0.4)

    def norm(step: int) -> float:
        return 40.0 if step in (98, 99, 103) else 1.0

    whole = LossHistory(STEPS)
    expected = list(watch(whole, healthy, valid, norm))
    assert kinds(expected) == ["unstable_gradients", "overfitting"]
    half = LossHistory(STEPS)
    told = list(watch(half, healthy, valid, norm, until=100))
    resumed = LossHistory.from_state(json.loads(json.dumps(half.state(), allow_nan=False)))
    assert resumed == half
    assert [*told, *watch(resumed, healthy, valid, norm)] == expected
    assert resumed == whole


def test_a_state_is_not_changed_by_the_history_that_came_from_it() -> None:
    state = LossHistory(STEPS).state()
    LossHistory.from_state(state).training(1, 2.0, 1.0)
    assert state == LossHistory(STEPS).state()


def test_a_state_stays_small_in_a_long_run() -> None:
    history = LossHistory(20_000)
    for step in range(1, 20_001):
        history.training(step, 2.0, 1.0)
    assert len(json.dumps(history.state())) < 20_000


def validated(*losses: float) -> LossHistory:
    history = LossHistory(STEPS)
    for index, loss in enumerate(losses, start=1):
        history.validation(10 * index, loss)
    return history


def test_early_stopping_waits_for_the_patience() -> None:
    assert validated(1.0, 0.8, 0.85, 0.9).should_stop(3) is None
    reason = validated(1.0, 0.8, 0.85, 0.9, 0.81).should_stop(3)
    assert reason is not None
    assert reason == "the validation loss has not improved in 3 validations; its best was 0.8000 at step 20"


def test_early_stopping_counts_an_equal_loss_as_no_gain() -> None:
    assert validated(1.0, 1.0).should_stop(1)


def test_early_stopping_counts_a_loss_that_is_no_number_as_no_gain() -> None:
    assert validated(1.0, math.nan).should_stop(1)
    assert "finite" in (validated(math.nan).should_stop(1) or "")


def test_without_validations_nothing_stops() -> None:
    assert LossHistory(STEPS).should_stop(1) is None


def test_a_patience_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="patience=0"):
        validated(1.0).should_stop(0)
