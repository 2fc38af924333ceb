"""What a training run will do, before it does it: examples, tokens, steps, memory, time, each with its reason. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.errors import CapacityError, InputError
from luthier.llm.rows import Row, pack, pack_groups, shared_prefix
from luthier.records.base_model import Machine, ModelShape
from luthier.records.training import AUTO, Derived, Measured, Resolved, TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample, TokenizedPair
from luthier.train.hyperparameters import resolve

PROCESS_BYTES = 900e6  # the interpreter with torch and transformers loaded, no model
LORA_INPUTS = 7  # linear layers per decoder layer that carry an adapter
USEFUL_SHARE = 0.4  # of the measured matrix rate that a whole training step reaches, where no step was measured
SECONDS_TO_START = 8.0
LOGITS_AT_ONCE = 8e6 * 4 * 3  # see luthier.llm.engine.target_logprobs

Unit = TokenizedExample | TokenizedPair


@dataclass(frozen=True)
class Material:
    """What there is to learn from: training and held-out units, and what was left out on the way."""

    examples: Sequence[Unit]
    validation: Sequence[Unit]
    report: RenderReport


def plan_training(material: Material, config: TrainingConfig, shape: ModelShape, machine: Machine) -> TrainingPlan:
    """Return the plan of a training run. Where it would not fit, rows are shortened first, then layers recomputed.

    Raises:
        InputError: there are fewer than two examples.
        CapacityError: the run cannot fit into memory; the hint says what to lower, and to what.
    """
    units = material.examples
    if len(units) < 2:
        raise InputError(
            f"{len(units)} example is too few to learn from; at least 2 are needed, 20 are sensible.",
            hint="add examples to the dataset, or leave fewer out",
        )
    longest = max(_length(unit) for unit in units)
    resolved, steps, reasons = resolve(config, len(units), longest, shape, machine)
    prefix = _prefix(units, material.validation)
    resolved = _fitted(resolved, config, longest, shape, machine, reasons)
    computed = computed_tokens(units, prefix, resolved)
    plan = TrainingPlan(
        examples=len(units),
        validation_examples=len(material.validation),
        tokens_per_epoch=sum(_tokens(unit) for unit in units),
        loss_tokens_per_epoch=sum(_loss_tokens(unit) for unit in units),
        computed_tokens_per_epoch=computed,
        longest_example=longest,
        shared_prefix=prefix,
        dropped=dict(material.report.dropped),
        truncated=material.report.truncated,
        steps=steps,
        resolved=resolved,
        memory_bytes=memory_bytes(resolved, shape),
        machine_memory_bytes=machine.memory_bytes,
        seconds=0.0,
        reasons=tuple(reasons),
    )
    validated = computed_tokens(material.validation, prefix, resolved) * (1 + steps // resolved.validate_every)
    operations = shape.linear_parameters * (4 * computed * resolved.epochs + 2 * validated)
    plan = plan.model_copy(
        update={"seconds": round(SECONDS_TO_START + operations / (machine.matmul_flops * USEFUL_SHARE), 1)}
    )
    refuse_what_cannot_fit(plan)
    return plan


def with_measured(plan: TrainingPlan, measured: Measured, validation: Sequence[Unit]) -> TrainingPlan:
    """Return the plan with memory and time from steps that were really made.

    Raises:
        CapacityError: as :func:`plan_training`.
    """
    trained = plan.computed_tokens_per_epoch * plan.resolved.epochs
    validations = 1 + plan.steps // plan.resolved.validate_every
    validated = computed_tokens(validation, plan.shared_prefix, plan.resolved) * validations
    seconds = SECONDS_TO_START + (trained + 0.5 * validated) * measured.seconds / measured.tokens
    found = plan.model_copy(
        update={"measured": measured, "memory_bytes": measured.peak_bytes, "seconds": round(seconds, 1)}
    )
    refuse_what_cannot_fit(found)
    return found


def computed_tokens(units: Sequence[Unit], prefix: int, resolved: Resolved) -> int:
    """Return how many tokens go through the model for these units, packed batch by batch."""
    batches = (units[first : first + resolved.batch_size] for first in range(0, len(units), resolved.batch_size))
    return sum(len(row.tokens) for batch in batches for row in rows_of(batch, prefix, resolved))


def rows_of(batch: Sequence[Unit], prefix: int, resolved: Resolved) -> list[Row]:
    """Return the rows that a batch goes through the model in."""
    pairs = [unit for unit in batch if isinstance(unit, TokenizedPair)]
    if not pairs:
        return pack([unit for unit in batch if isinstance(unit, TokenizedExample)], prefix, resolved.tokens_per_row)
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    return pack_groups(sides, [(2 * i, 2 * i + 1) for i in range(len(pairs))], resolved.tokens_per_row)


def memory_bytes(resolved: Resolved, shape: ModelShape) -> int:
    """Estimate a run's peak memory: process, base, what is trained with its optimizer, activations, logits."""
    number = 2 if resolved.precision == "bfloat16" else 4
    key_width = shape.width // shape.heads * shape.key_heads
    kept = 1 if resolved.recompute else 4 + 2 * key_width / shape.width + 2 * shape.intermediate / shape.width
    activations = resolved.tokens_per_row * shape.width * number * (shape.layers * kept + 12)
    return int(PROCESS_BYTES + _weights(resolved, shape, number) + activations + LOGITS_AT_ONCE)


def refuse_what_cannot_fit(plan: TrainingPlan) -> None:
    """Raise where a plan needs more memory than there is.

    Raises:
        CapacityError: with what to lower, and to what.
    """
    if plan.memory_bytes <= plan.machine_memory_bytes:
        return
    row = plan.resolved.tokens_per_row
    over = plan.memory_bytes / plan.machine_memory_bytes
    raise CapacityError(
        f"This run needs about {plan.memory_bytes / 1e9:.1f} GB and the machine has "
        f"{plan.machine_memory_bytes / 1e9:.1f} GB free.",
        hint=f"set max_tokens and tokens_per_row to {max(64, int(row / over / 1.2))} (now {row}; the longest example "
        f"has {plan.longest_example} tokens), use mode qlora, or take a smaller base model",
    )


def _weights(resolved: Resolved, shape: ModelShape, number: int) -> float:
    if not resolved.has_adapter:
        moments = 2 if resolved.optimizer == "adamw_8bit" else 8
        share = resolved.last_layers / shape.layers if resolved.mode == "last_layers" else 1.0
        return shape.parameters * (4 + share * (4 + moments))
    adapter = shape.layers * resolved.lora_rank * (LORA_INPUTS * 2 * shape.width + 3 * shape.intermediate)
    linear = shape.linear_parameters
    base: float = (shape.parameters - linear) * number
    base += linear * (resolved.base_bits / 8 + 0.07 if resolved.mode == "qlora" else number)
    return base + adapter * 16


def _fitted(
    resolved: Resolved,
    config: TrainingConfig,
    longest: int,
    shape: ModelShape,
    machine: Machine,
    reasons: list[Derived],
) -> Resolved:
    """Return the numbers with rows shortened, then layers recomputed, as far as memory asks and options allow."""

    def fits(found: Resolved) -> bool:
        return memory_bytes(found, shape) <= machine.memory_bytes

    while not fits(resolved) and config.tokens_per_row == AUTO and resolved.tokens_per_row > longest:
        shorter = max(longest, resolved.tokens_per_row // 2)
        resolved = resolved.model_copy(update={"tokens_per_row": shorter})
        reasons.append(Derived(name="tokens per row", value=str(shorter), reason="halved to fit the memory"))
    if not fits(resolved) and config.recompute == AUTO:
        resolved = resolved.model_copy(update={"recompute": True})
        reason = "layers are computed again in the backward pass (a third more work) to fit the memory"
        reasons.append(Derived(name="recompute", value="yes", reason=reason))
    return resolved


def _prefix(units: Sequence[Unit], validation: Sequence[Unit]) -> int:
    """Return how many first tokens all examples share; pairs share theirs by twos alone."""
    if isinstance(units[0], TokenizedPair):
        return 0
    both = [units[0], *validation[:1]]
    return min(shared_prefix(some) for some in (units, validation, both) if some)  # type: ignore[arg-type]


def _sides(unit: Unit) -> tuple[TokenizedExample, ...]:
    return (unit.chosen, unit.rejected) if isinstance(unit, TokenizedPair) else (unit,)


def _tokens(unit: Unit) -> int:
    return sum(len(side.tokens) for side in _sides(unit))


def _loss_tokens(unit: Unit) -> int:
    return sum(sum(side.loss_mask) for side in _sides(unit))


def _length(unit: Unit) -> int:
    """Return the fewest tokens that a row must have to hold a unit."""
    sides = _sides(unit)
    prefix = shared_prefix(sides) if len(sides) > 1 else 0
    return prefix + sum(len(side.tokens) - prefix for side in sides)
