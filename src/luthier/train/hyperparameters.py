"""The rules behind ``auto``: every hyperparameter that was not given, and why it is what it is.

The rules depend on the number of examples and of their tokens with loss, the model's width and the machine. They are
defaults that a person can read and overrule; ``docs/training.md`` lists them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, TypeVar

from luthier.errors import InputError
from luthier.records.base_model import FAST_BFLOAT16, FAST_INT8, Machine, ModelShape
from luthier.records.objectives import KtoOptions, Method
from luthier.records.training import (
    ADAPTERS,
    AUTO,
    INTEGER_MODES,
    AdapterShape,
    Derived,
    Precision,
    Resolved,
    TrainingConfig,
)

T = TypeVar("T")
NO_INTEGERS = "precision=int8 is for processors that add products of 8-bit integers exactly; {where} does not."


@dataclass(frozen=True)
class Amount:
    """How much there is to learn from: examples, their tokens with loss, and the tokens of the longest one of all.

    ``liked`` and ``disliked`` are what examples with thumbs up and down weigh in all, where they have thumbs.
    """

    examples: int
    loss_tokens: int
    longest: int
    liked: float = 0.0
    disliked: float = 0.0


@dataclass(frozen=True)
class _Rule:
    """What ``auto`` means for a method.

    Visits of examples in all, and learned tokens in all, whichever is reached first; most passes; factor on the
    learning rate.
    """

    visits: float
    loss_tokens: float
    max_epochs: int
    rate: float

    def epochs(self, amount: Amount) -> int:
        """Return the passes over an amount."""
        wanted = min(self.visits / amount.examples, self.loss_tokens / max(1, amount.loss_tokens))
        return min(self.max_epochs, max(1, round(min(wanted, self.max_epochs))))

    @property
    def limits(self) -> str:
        """Both limits in words."""
        words = [f"{self.visits:,.0f} visits of examples"] if self.visits < math.inf else []
        words += [f"{self.loss_tokens:,.0f} learned tokens"] if self.loss_tokens < math.inf else []
        return " or ".join(words)


RULES: dict[Method, _Rule] = {
    "supervised": _Rule(1_500, 600_000, 10, 1.0),
    "raw_text": _Rule(math.inf, 1_500_000, 3, 0.4),
    "dpo": _Rule(2_000, 1_200_000, 3, 0.1),
    "orpo": _Rule(2_000, 1_200_000, 3, 0.2),
    "kto": _Rule(2_000, 1_200_000, 3, 0.1),
    "reward": _Rule(2_000, math.inf, 3, 0.4),
    "classification": _Rule(40_000, math.inf, 10, 1.0),
    "regression": _Rule(40_000, math.inf, 10, 1.0),
}
FULL_RATE = 0.2
STEPS_PER_EPOCH = 80
BATCH_LOSS_TOKENS = 16_384
BITS_PER_PARAMETER = 2  # that a trained number can know (Allen-Zhu and Li 2024, arXiv 2404.05405)
RANKS = (16, 32, 64, 128)
RSLORA_ALPHA = 8.0  # the same at every rank (Kalajdzievski 2023, arXiv 2312.03732): the scale falls with its root
LAST_LAYERS_SHARE = 0.25
RAW_TEXT_TOKENS = 1_024
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
            value, reason = given, "given"
        self.note(name, value, reason)
        return value

    def pick_within(
        self,
        name: str,
        given: int | Literal["auto"],
        value: int,
        reason: str,
        *,
        least: tuple[int, str] = (1, ""),
        most: tuple[int, str] = (sys.maxsize, ""),
    ) -> int:
        """Return the same within bounds, of which each says what it is; note where one made it another number."""
        if given != AUTO:
            value, reason = given, "given"
        if value < least[0]:
            value, reason = least[0], f"{value:,} ({reason}) is raised to {least[1]}"
        if value > most[0]:
            value, reason = most[0], f"{value:,} ({reason}) is cut to {most[1]}"
        self.note(name, value, reason)
        return value

    def note(self, name: str, value: object, reason: str) -> None:
        """Note a value and its reason."""
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        self.found.append(Derived(name=name, value=text, reason=reason))


def resolve(
    config: TrainingConfig, amount: Amount, shape: ModelShape, machine: Machine, start: AdapterShape | None = None
) -> tuple[Resolved, int, list[Derived]]:
    """Derive every ``auto`` value; return them, the number of optimizer steps, and the reasons.

    Where training goes on from an adapter, ``start`` says what that has decided.
    """
    reasons, rule, examples = Reasons(), RULES[config.method], amount.examples
    epochs = float(
        reasons.pick(
            "epochs",
            config.epochs,
            float(rule.epochs(amount)),
            f"{config.method}: about {rule.limits} in all, 1 to {rule.max_epochs} passes over {examples:,} examples "
            f"with {amount.loss_tokens:,} learned tokens",
        )
    )
    all_examples = (examples, "the examples that there are")
    batch_size = reasons.pick_within(
        "batch size", config.batch_size, _batch_size(amount), _BATCH_REASON, most=all_examples
    )
    steps = max(1, math.ceil(examples * epochs / batch_size))
    adapter = _adapter(config, amount, shape, start, reasons)
    learning_rate = _learning_rate(config, shape, batch_size, reasons)
    warmup_share = reasons.pick("warm-up", config.warmup_share, 0.06, "6 % of the steps")
    validations = int(reasons.pick("validations", config.validations, min(4, steps), "four looks at held-out loss"))
    at_risk = "a tenth of the work is at risk, and at most 10 minutes of it"
    checkpoints = int(reasons.pick("checkpoints", config.checkpoints, min(10, steps), at_risk))
    row = _tokens_per_row(config, amount.longest, machine, reasons)
    resolved = Resolved(
        method=config.method,
        mode=adapter.mode if config.mode == "lora" else config.mode,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        layer_decay=config.layer_decay,
        warmup_steps=math.ceil(warmup_share * steps),
        schedule=config.schedule,
        optimizer=config.optimizer,
        lora_rank=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        lora_layers=config.lora_layers,
        base_bits=config.base_bits,
        last_layers=_last_layers(config, shape, reasons),
        weight_decay=config.weight_decay,
        max_gradient_norm=config.max_gradient_norm,
        max_tokens=max_tokens(config, shape),
        tokens_per_row=row,
        recompute=config.recompute is True,
        validate_every=math.ceil(steps / validations),
        early_stopping=config.early_stopping,
        checkpoint_every=math.ceil(steps / checkpoints),
        precision=_precision(config, machine, reasons),
        seed=config.seed,
        supervised=config.supervised,
        dpo=config.dpo,
        orpo=config.orpo,
        kto=_kto(config, amount, reasons),
        reward=config.reward,
    )
    return resolved, steps, reasons.found


def _adapter(
    config: TrainingConfig, amount: Amount, shape: ModelShape, start: AdapterShape | None, reasons: Reasons
) -> AdapterShape:
    if start is not None:
        for name, value in (("LoRA rank", start.rank), ("LoRA alpha", start.alpha)):
            reasons.note(name, value, "that of the adapter from which training goes on")
        return start
    rank = _rank(config, amount, shape, reasons)
    alpha, reason = 2.0 * rank, "twice the rank, so its scale is 2"
    if config.mode == "rslora":
        alpha, reason = RSLORA_ALPHA, "its scale, alpha / √rank, is 2 at rank 16"
    if config.mode in ADAPTERS:
        alpha = reasons.pick("LoRA alpha", config.lora_alpha, alpha, reason)
    return AdapterShape(rank=rank, alpha=alpha, dropout=config.lora_dropout)


def max_tokens(config: TrainingConfig, shape: ModelShape) -> int:
    """Return the longest example that is allowed: as given, else the context, at most :data:`MAX_AUTO_TOKENS`."""
    limit = min(shape.context_length, RAW_TEXT_TOKENS if config.method == "raw_text" else MAX_AUTO_TOKENS)
    return limit if config.max_tokens == AUTO else min(int(config.max_tokens), shape.context_length)


_BATCH_REASON = (
    f"some {STEPS_PER_EPOCH} steps a pass: a power of two from 4 to 32, above 4 of at most {BATCH_LOSS_TOKENS:,} "
    "learned tokens: more of them average out what each says"
)


def _batch_size(amount: Amount) -> int:
    """Return the power of two that makes about the wanted steps, with no more learned tokens than a step needs."""
    enough = BATCH_LOSS_TOKENS * amount.examples / max(1, amount.loss_tokens)
    largest = 2.0 ** math.floor(math.log2(max(4, min(32, enough))))
    return int(min(largest, max(4, 2 ** round(math.log2(max(1, amount.examples / STEPS_PER_EPOCH))))))


def _rank(config: TrainingConfig, amount: Amount, shape: ModelShape, reasons: Reasons) -> int:
    """Return the least usual rank whose numbers can know a bit of every learned token."""
    enough = (rank for rank in RANKS if BITS_PER_PARAMETER * shape.adapter_parameters(rank) >= amount.loss_tokens)
    rank = next(enough, RANKS[-1])
    if config.mode not in ADAPTERS:
        return rank
    size = f"its {shape.adapter_parameters(rank):,} numbers can know a bit of each learned token, two bits a number"
    return reasons.pick("LoRA rank", config.lora_rank, rank, size if rank < RANKS[-1] else "the most that is usual")


def _learning_rate(config: TrainingConfig, shape: ModelShape, batch_size: int, reasons: Reasons) -> float:
    width = math.sqrt(REFERENCE_WIDTH / shape.width)
    batch = math.sqrt(min(1.0, batch_size / REFERENCE_BATCH))
    method = RULES[config.method].rate * (FULL_RATE if config.mode not in ADAPTERS else 1.0)
    rate = REFERENCE_LEARNING_RATE * width * batch * method
    reason = (
        f"{REFERENCE_LEARNING_RATE:g} at width {REFERENCE_WIDTH} and batch {REFERENCE_BATCH}, "
        f"falling with the square root of width ({shape.width}) and of smaller batches ({batch_size})"
    )
    if method != 1.0:
        reason += f", times {method:g} for {config.method} in mode {config.mode}"
    if config.learning_rate != AUTO:
        rate, reason = config.learning_rate, "given"
    if config.learning_rate_multiplier != 1.0:
        reason += f", times {config.learning_rate_multiplier:g} (learning_rate_multiplier)"
    rate *= config.learning_rate_multiplier
    reasons.note("learning rate", rate, reason)
    return rate


def _kto(config: TrainingConfig, amount: Amount, reasons: Reasons) -> KtoOptions:
    """Return the options with weights by which thumbs up and down count the same: the rarer kind's is above 1."""
    given = config.kto
    if config.method != "kto":
        return given
    ratio = amount.disliked / amount.liked if amount.liked and amount.disliked else 1.0
    up, down = max(1.0, ratio), max(1.0, 1 / ratio)
    if given.undesirable_weight != AUTO:
        up = given.undesirable_weight * ratio
    if given.desirable_weight != AUTO:
        down = given.desirable_weight / ratio
    reason = f"thumbs up weigh {amount.liked:g} in all, thumbs down {amount.disliked:g}: both are to count the same"
    return given.model_copy(
        update={
            "desirable_weight": reasons.pick("weight of thumbs up", given.desirable_weight, up, reason),
            "undesirable_weight": reasons.pick("weight of thumbs down", given.undesirable_weight, down, reason),
        }
    )


def _last_layers(config: TrainingConfig, shape: ModelShape, reasons: Reasons) -> int:
    if config.mode != "last_layers":
        return 0
    some = max(1, round(LAST_LAYERS_SHARE * shape.layers))
    reason = f"a quarter of the {shape.layers} layers: what the task needs is mostly there"
    return reasons.pick_within("last layers", config.last_layers, some, reason, most=(shape.layers, "all layers"))


def _tokens_per_row(config: TrainingConfig, longest: int, machine: Machine, reasons: Reasons) -> int:
    usual = 1024 if machine.device == "cpu" else 8192
    reason = f"rows of {usual:,} tokens keep this {machine.device} busy"
    return reasons.pick_within(
        "tokens per row", config.tokens_per_row, usual, reason, least=(longest, "the longest example")
    )


def _precision(config: TrainingConfig, machine: Machine, reasons: Reasons) -> Precision:
    value: Precision = "bfloat16" if machine.has_fast_bfloat16 else "float32"
    name = machine.device_name or machine.device
    if machine.bfloat16_speed:
        measured = f"{name} multiplies bfloat16 at {machine.bfloat16_speed:.2f} times float32's rate"
        reason = f"{measured} (it is taken from {FAST_BFLOAT16} on, for half of the memory)"
    else:
        reason = f"{name} {'has' if machine.has_fast_bfloat16 else 'lacks'} fast bfloat16 products"
    reason += "; what is trained, the loss and the optimizer stay float32"
    rival = (machine.bfloat16_speed or 1.0) if value == "bfloat16" else 1.0
    speed = (machine.int8_speed or 0.0) / rival
    rounded = f"the frozen base {speed:.1f} times as fast as {value} (gradients are off by 2 to 5 %)"
    if config.precision == "int8":
        if machine.int8_speed is None:
            raise InputError(NO_INTEGERS.format(where=f"{name} ({machine.device})"), hint="precision=auto")
        reasons.note("precision", "int8", f"given; it multiplies {rounded}")
        return "int8"
    if speed >= FAST_INT8 and config.mode in INTEGER_MODES:
        reason += f"; precision=int8 would multiply {rounded}"
    return reasons.pick("precision", config.precision, value, reason)
