"""The rules behind ``auto``: every hyperparameter that was not given, and why it is what it is.

The rules depend on the number of examples, the model's width and the machine. They are defaults that a person can
read and overrule; ``docs/training.md`` lists them.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

from luthier.records.base_model import Machine, ModelShape
from luthier.records.training import AUTO, Derived, Resolved, TrainingConfig

T = TypeVar("T")

EXAMPLE_VISITS = 1_500
MAX_EPOCHS = 10
STEPS_PER_EPOCH = 80
REFERENCE_LEARNING_RATE = 5e-4
REFERENCE_WIDTH = 576
REFERENCE_BATCH = 16
MAX_AUTO_TOKENS = 4_096


class Reasons:
    """Collects derived values with their reasons."""

    def __init__(self) -> None:
        self.found: list[Derived] = []

    def pick(self, name: str, given: T | Literal["auto"], value: T, reason: str) -> T:
        """Return what was given, or ``value`` where it is ``auto``; note either with its reason."""
        if given != AUTO:
            self.note(name, given, "given")
            return given
        self.note(name, value, reason)
        return value

    def note(self, name: str, value: object, reason: str) -> None:
        """Note a value and its reason."""
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        self.found.append(Derived(name=name, value=text, reason=reason))


def resolve(
    config: TrainingConfig, examples: int, longest: int, shape: ModelShape, machine: Machine
) -> tuple[Resolved, int, list[Derived]]:
    """Derive every ``auto`` value; return them, the number of optimizer steps, and the reasons."""
    reasons = Reasons()
    epochs = float(
        reasons.pick(
            "epochs",
            config.epochs,
            float(min(MAX_EPOCHS, max(1, round(EXAMPLE_VISITS / examples)))),
            f"about {EXAMPLE_VISITS:,} visits of examples in all, 1 to {MAX_EPOCHS} passes over {examples:,}",
        )
    )
    batch_size = min(examples, reasons.pick("batch size", config.batch_size, _batch_size(examples), _BATCH_REASON))
    steps = max(1, math.ceil(examples * epochs / batch_size))
    rank = reasons.pick("LoRA rank", config.lora_rank, 16, "enough for tasks of up to some 10,000 examples")
    learning_rate = _learning_rate(config, shape, batch_size, reasons)
    warmup_share = reasons.pick("warm-up", config.warmup_share, 0.06, "6 % of the steps")
    validations = int(reasons.pick("validations", config.validations, min(4, steps), "four looks at held-out loss"))
    checkpoints = int(reasons.pick("checkpoints", config.checkpoints, min(10, steps), "a tenth of the work is at risk"))
    resolved = Resolved(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=math.ceil(warmup_share * steps),
        schedule=config.schedule,
        lora_rank=rank,
        lora_alpha=reasons.pick("LoRA alpha", config.lora_alpha, 2.0 * rank, "twice the rank, so its scale is 2"),
        lora_dropout=config.lora_dropout,
        weight_decay=config.weight_decay,
        max_gradient_norm=config.max_gradient_norm,
        max_tokens=max_tokens(config, shape),
        tokens_per_row=_tokens_per_row(config, longest, machine, reasons),
        validate_every=max(1, steps // max(1, validations)),
        checkpoint_every=max(1, steps // max(1, checkpoints)),
        precision=_precision(config, machine, reasons),
        seed=config.seed,
    )
    return resolved, steps, reasons.found


def max_tokens(config: TrainingConfig, shape: ModelShape) -> int:
    """Return the longest example that is allowed: as given, else the context, at most :data:`MAX_AUTO_TOKENS`."""
    limit = min(shape.context_length, MAX_AUTO_TOKENS)
    return limit if config.max_tokens == AUTO else min(int(config.max_tokens), shape.context_length)


_BATCH_REASON = f"some {STEPS_PER_EPOCH} steps a pass: a power of two from 4 to 32"


def _batch_size(examples: int) -> int:
    return int(min(32, max(4, 2 ** round(math.log2(max(1, examples / STEPS_PER_EPOCH))))))


def _learning_rate(config: TrainingConfig, shape: ModelShape, batch_size: int, reasons: Reasons) -> float:
    width = math.sqrt(REFERENCE_WIDTH / shape.width)
    batch = math.sqrt(min(1.0, batch_size / REFERENCE_BATCH))
    derived = REFERENCE_LEARNING_RATE * width * batch * config.learning_rate_multiplier
    reason = (
        f"{REFERENCE_LEARNING_RATE:g} at width {REFERENCE_WIDTH} and batch {REFERENCE_BATCH}, "
        f"falling with the square root of width ({shape.width}) and of smaller batches ({batch_size})"
    )
    if config.learning_rate_multiplier != 1.0:
        reason += f", times {config.learning_rate_multiplier:g} as given"
    return reasons.pick("learning rate", config.learning_rate, derived, reason)


def _tokens_per_row(config: TrainingConfig, longest: int, machine: Machine, reasons: Reasons) -> int:
    usual = 1024 if machine.device == "cpu" else 8192
    reason = f"rows of {usual:,} tokens keep this {machine.device} busy; never under the longest example ({longest:,})"
    return max(longest, reasons.pick("tokens per row", config.tokens_per_row, max(usual, longest), reason))


def _precision(config: TrainingConfig, machine: Machine, reasons: Reasons) -> Literal["float32", "bfloat16"]:
    value: Literal["float32", "bfloat16"] = "bfloat16" if machine.has_fast_bfloat16 else "float32"
    has = "has" if machine.has_fast_bfloat16 else "lacks"
    reason = f"this {machine.device_name or machine.device} {has} fast bfloat16 products; adapter and loss stay float32"
    return reasons.pick("precision", config.precision, value, reason)
