"""Judges a training run from its history of losses: when to stop early, and what to warn of. Pure.

In come the loss of every step and of every validation; out come a reason to stop and warnings, each with its numbers and
what to do. The history's state is plain JSON and goes into the checkpoint, so that a resumed run judges the same.

Losses are means per token in nats, or another loss that starts above zero and falls; the rules on training losses hold
their peace where it does not. A **window** is a tenth of the steps, 5 to 100 of them: single batches are noisy, and
rules on the training loss look at the mean of a window only.

| kind | rule |
|---|---|
| ``overfitting`` | the validation loss is over 3 % and 0.01 above its best, the mean training loss is lower than it was at that best, and the rise is confirmed: by a second validation in a row, by more than 10 %, or by the last step |
| ``diverging`` | a loss is NaN or infinite (the step is left out); or the last window's mean is over 1.5 times the best window's, by more than 4.5 standard errors of their difference and by more than a tenth of the first window's mean |
| ``learning_nothing`` | after 30 % of the steps the last window's mean is not 2 % below the first's, and has not been for a window of steps (so 14 steps at the least); noise does not hide a fall of 10 % (three standard errors; one where the validation loss did not fall either); and the validation loss, once there is one, was measured twice and did not fall by 2 % |
| ``unstable_gradients`` | three gradient norms among the last window (at least 10 steps) were over 10 times the median of the 500 before them and over the median of the first window; or one was not finite (the step is left out) |
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any, Literal

from luthier.records.record import Record

WINDOW_SHARE = 10
SMALLEST_WINDOW, LARGEST_WINDOW = 5, 100

OVERFITTING_RISE, SURE_OVERFITTING_RISE = 0.03, 0.10
LEAST_RISE_NATS = 0.01

DIVERGING_FACTOR = 1.5
DIVERGING_ERRORS = 4.5  # the best window is the lowest of many, by chance too
DIVERGING_SHARE = 0.1

LEAST_FALL, HIDDEN_FALL = 0.02, 0.10
HIDDEN_FALL_ERRORS, CONFIRMED_ERRORS = 3.0, 1.0
LEARNING_SHARE = 0.3

SPIKE_FACTOR, SPIKES = 10.0, 3
KNOWN_NORMS, LEAST_NORMS = 500, 10

Kind = Literal["overfitting", "diverging", "learning_nothing", "unstable_gradients"]


class Warning(Record):
    """What seems wrong with a run at a step, with the numbers that say so, and what to do about it."""

    kind: Kind
    step: int
    message: str
    hint: str


@dataclass
class LossHistory:
    """What is remembered of a run's losses; every field is plain JSON, and none grows with the steps.

    Only the validations are all kept. A loss that is not finite is remembered by its step alone.
    """

    steps: int
    step: int = 0
    first: list[float] = field(default_factory=list)  # the first window of training losses
    recent: list[float] = field(default_factory=list)  # the last window of them
    changes: int = 0  # how often a loss was compared with the one before
    squared_changes: float = 0.0  # sum of the squares of those changes, as shares of the two losses' mean
    best_mean: float | None = None  # the lowest mean that a window had
    flat_steps: int = 0  # for so many steps in a row the last window was not below the first
    first_norms: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)  # steps of the latest spikes
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float | None] = field(default_factory=list)  # None: not finite
    mean_at_best: float | None = None  # the last window's mean at the best validation
    broken_step: int | None = None  # the first loss that was not finite
    broken_loss: str = ""  # and which one that was
    broken_norm_step: int | None = None  # the first gradient norm that was not finite, beside a loss that was
    raised: list[str] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LossHistory:
        """Return the history that :meth:`state` described."""
        values: dict[str, Any] = deepcopy(dict(state))
        return cls(**values)

    def state(self) -> dict[str, Any]:
        """Return everything remembered, as JSON."""
        return asdict(self)

    @property
    def window(self) -> int:
        """How many steps a mean is taken over."""
        return min(LARGEST_WINDOW, max(SMALLEST_WINDOW, self.steps // WINDOW_SHARE))

    def training(self, step: int, loss: float, gradient_norm: float) -> None:
        """Take in one optimizer step (the first is 1)."""
        self.step = step
        if math.isfinite(gradient_norm):
            self._take_norm(step, gradient_norm)
        if not math.isfinite(loss):
            self._take_broken(step, "loss; the step was left out")
            return
        if not math.isfinite(gradient_norm):
            self.broken_norm_step = self.broken_norm_step or step
        if self.recent and loss + self.recent[-1] > 0:
            self.changes += 1
            self.squared_changes += (2 * (loss - self.recent[-1]) / (loss + self.recent[-1])) ** 2
        _keep_first(self.first, loss, self.window)
        _keep_last(self.recent, loss, self.window)
        if len(self.recent) == self.window:
            mean = fmean(self.recent)
            self.best_mean = mean if self.best_mean is None else min(mean, self.best_mean)
            apart = step >= 2 * self.window
            flat = apart and mean > (1 - LEAST_FALL) * fmean(self.first)
            self.flat_steps = self.flat_steps + 1 if flat else 0

    def validation(self, step: int, loss: float) -> None:
        """Take in a validation, after the training step that it followed."""
        known = [before for before in self.validation_losses if before is not None]
        if not math.isfinite(loss):
            self._take_broken(step, "validation loss")
        elif not known or loss < min(known):
            self.mean_at_best = fmean(self.recent) if self.recent else None
        self.validation_steps.append(step)
        self.validation_losses.append(loss if math.isfinite(loss) else None)

    def should_stop(self, patience: int) -> str | None:
        """Return why to stop early, or None: that none of the last ``patience`` validations was the best one."""
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1")
        best, best_step, waited = math.inf, 0, 0
        for step, loss in zip(self.validation_steps, self.validation_losses, strict=True):
            if loss is not None and loss < best:
                best, best_step, waited = loss, step, 0
            else:
                waited += 1
        if waited < patience:
            return None
        times = "validation" if waited == 1 else "validations"
        if best_step == 0:
            return f"no validation loss was a finite number in {waited} {times}"
        return f"the validation loss has not improved in {waited} {times}; its best was {best:.4f} at step {best_step}"

    def warnings(self) -> list[Warning]:
        """Return what is newly wrong, each kind once in a run; to be asked after every step."""
        found = [self._diverging(), self._overfitting(), self._learning_nothing(), self._unstable_gradients()]
        new = [warning for warning in found if warning and warning.kind not in self.raised]
        self.raised += [warning.kind for warning in new]
        return new

    def _take_broken(self, step: int, loss: str) -> None:
        if self.broken_step is None:
            self.broken_step, self.broken_loss = step, loss

    def _take_norm(self, step: int, norm: float) -> None:
        known = len(self.norms) >= LEAST_NORMS
        if known and norm > max(SPIKE_FACTOR * median(self.norms), median(self.first_norms)):
            _keep_last(self.spikes, step, SPIKES)
        _keep_first(self.first_norms, norm, max(self.window, LEAST_NORMS))
        _keep_last(self.norms, norm, KNOWN_NORMS)

    def _relative_error(self) -> float:
        """Return the standard error of the difference of two windows' means, as a share of the mean.

        From the mean square successive difference (twice the variance, von Neumann 1941): a trend counts little.
        """
        variance = self.squared_changes / 2 / max(1, self.changes)
        return math.sqrt(2 * variance / self.window)

    def _diverging(self) -> Warning | None:
        if self.broken_step is not None:
            return Warning(
                kind="diverging",
                step=self.broken_step,
                message=f"Step {self.broken_step} has no finite {self.broken_loss}.",
                hint="lower learning_rate_multiplier to 0.3, set precision to float32, or look for broken examples",
            )
        if len(self.recent) < self.window or self.best_mean is None or self.best_mean <= 0:
            return None
        mean = fmean(self.recent)
        error = self._relative_error() * (mean + self.best_mean) / 2
        rise = mean - self.best_mean
        if mean <= DIVERGING_FACTOR * self.best_mean or rise <= max(
            DIVERGING_ERRORS * error, DIVERGING_SHARE * fmean(self.first)
        ):
            return None
        return Warning(
            kind="diverging",
            step=self.step,
            message=f"The training loss climbs: {mean:.3f} over the last {self.window} steps, "
            f"{mean / self.best_mean:.1f} times the best such mean of {self.best_mean:.3f}.",
            hint="lower learning_rate_multiplier to 0.3; if it climbs again, raise warmup_share to 0.1 "
            "or the batch_size",
        )

    def _overfitting(self) -> Warning | None:
        losses = [math.inf if loss is None else loss for loss in self.validation_losses]
        if len(losses) < 2 or not math.isfinite(losses[-1]) or self.mean_at_best is None or not self.recent:
            return None
        best, mean = min(losses), fmean(self.recent)
        level = best + max(OVERFITTING_RISE * best, LEAST_RISE_NATS)
        if losses[-1] <= level or mean >= self.mean_at_best:
            return None
        best_at = losses.index(best)
        again = best_at < len(losses) - 2 and losses[-2] > level
        sure = losses[-1] > best + max(SURE_OVERFITTING_RISE * best, LEAST_RISE_NATS)
        if not (again or sure or self.step >= self.steps):
            return None
        best_step = self.validation_steps[best_at]
        return Warning(
            kind="overfitting",
            step=self.validation_steps[-1],
            message=f"The validation loss rose from {best:.3f} at step {best_step} to {losses[-1]:.3f} "
            f"(+{losses[-1] / best - 1:.0%}) while the training loss fell from {self.mean_at_best:.3f} to {mean:.3f}: "
            "the model learns the examples by heart.",
            hint=f"train for fewer epochs (step {best_step} of {self.steps} was the best), add more or more varied "
            "examples, or lower learning_rate_multiplier to 0.3 or lora_rank to 8",
        )

    def _learning_nothing(self) -> Warning | None:
        early = self.step < LEARNING_SHARE * self.steps
        if early or self.flat_steps < self.window or "diverging" in self.raised or fmean(self.first) <= 0:
            return None
        known = [loss for loss in self.validation_losses if loss is not None]
        flat = len(known) > 1 and min(known) >= (1 - LEAST_FALL) * known[0]
        if known and not flat:  # it fell, or there is but one yet, and the next will tell
            return None
        first, mean = fmean(self.first), fmean(self.recent)
        errors = CONFIRMED_ERRORS if flat else HIDDEN_FALL_ERRORS
        if 1 - mean / first + errors * self._relative_error() > HIDDEN_FALL:
            return None
        return Warning(
            kind="learning_nothing",
            step=self.step,
            message=f"After {self.step} of {self.steps} steps the training loss is {mean:.3f} over {self.window} steps "
            f"and was {first:.3f} over the first {self.window} ({mean / first - 1:+.1%}): nothing is learned.",
            hint="check that the answers follow from the inputs (shuffled or empty labels?); raise "
            "learning_rate_multiplier to 3; if the loss was low from the start, the base model knows the task already",
        )

    def _unstable_gradients(self) -> Warning | None:
        if self.broken_norm_step is not None:
            return Warning(
                kind="unstable_gradients",
                step=self.broken_norm_step,
                message=f"Step {self.broken_norm_step} has no finite gradient; the step was left out.",
                hint="lower learning_rate_multiplier to 0.3, set precision to float32, or look for broken examples",
            )
        span = max(self.window, LEAST_NORMS)
        if len(self.spikes) < SPIKES or self.spikes[0] <= self.step - span:
            return None
        usual = f"{SPIKE_FACTOR:.0f} times their median of {median(self.norms):.3g}"
        return Warning(
            kind="unstable_gradients",
            step=self.step,
            message=f"{SPIKES} gradient norms within {span} steps were above {usual} "
            f"(steps {', '.join(map(str, self.spikes))}).",
            hint="lower learning_rate_multiplier to 0.3, look for broken or wrongly labelled examples, "
            "or raise batch_size",
        )


def _keep_first(values: list[float], value: float, count: int) -> None:
    if len(values) < count:
        values.append(value)


def _keep_last(values: list[Any], value: float, count: int) -> None:
    values.append(value)
    del values[:-count]
