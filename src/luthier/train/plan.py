"""What a training run will do, before it does it: examples, tokens, steps, memory, time, each with its reason. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.errors import CapacityError, InputError
from luthier.llm.rows import computed_tokens, shared_prefix
from luthier.records.base_model import Machine, ModelShape
from luthier.records.training import Resolved, TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.hyperparameters import resolve

PROCESS_BYTES = 900e6  # the interpreter with torch and transformers loaded, no model
LORA_INPUTS = 7  # linear layers per decoder layer that carry an adapter
USEFUL_SHARE = 0.33  # of the measured matrix rate that a whole training step reaches
SECONDS_TO_START = 8.0


def plan_training(
    examples: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    report: RenderReport,
    config: TrainingConfig,
    shape: ModelShape,
    machine: Machine,
) -> TrainingPlan:
    """Return the plan of a supervised LoRA run.

    Raises:
        InputError: there are fewer than two examples.
        CapacityError: the run cannot fit into memory; the hint says what to lower.
    """
    if len(examples) < 2:
        raise InputError(f"{len(examples)} example is too few to learn from; at least 2 are needed, 20 are sensible.")
    longest = max(len(example.tokens) for example in examples)
    resolved, steps, reasons = resolve(config, len(examples), longest, shape, machine)
    prefix = shared_prefix([*examples, *validation])
    computed = computed_tokens(examples, prefix, resolved.tokens_per_row, resolved.batch_size)
    validated = computed_tokens(validation, prefix, resolved.tokens_per_row, len(validation) or 1)
    memory = memory_bytes(resolved, shape, _most_targets(examples, resolved))
    plan = TrainingPlan(
        examples=len(examples),
        validation_examples=len(validation),
        tokens_per_epoch=sum(len(example.tokens) for example in examples),
        loss_tokens_per_epoch=sum(sum(example.loss_mask) for example in examples),
        computed_tokens_per_epoch=computed,
        longest_example=longest,
        shared_prefix=prefix,
        dropped=dict(report.dropped),
        truncated=report.truncated,
        steps=steps,
        resolved=resolved,
        memory_bytes=memory,
        machine_memory_bytes=machine.memory_bytes,
        seconds=_seconds(computed * resolved.epochs, validated * steps / resolved.validate_every, shape, machine),
        reasons=tuple(reasons),
    )
    _refuse_what_cannot_fit(plan)
    return plan


def memory_bytes(resolved: Resolved, shape: ModelShape, targets: int) -> int:
    """Estimate a run's peak memory: process, frozen base, adapter with its optimizer, activations, logits."""
    number = 2 if resolved.precision == "bfloat16" else 4
    base = shape.parameters * number
    adapter = shape.layers * resolved.lora_rank * (LORA_INPUTS * 2 * shape.width + 3 * shape.intermediate)
    per_token = shape.layers * (34 * shape.width + 14 * shape.intermediate) * number
    logits = targets * shape.vocabulary * 4 * 3
    return int(PROCESS_BYTES + base + adapter * 16 + resolved.tokens_per_row * per_token + logits)


def _most_targets(examples: Sequence[TokenizedExample], resolved: Resolved) -> int:
    share = max(sum(example.loss_mask) / len(example.tokens) for example in examples)
    return int(share * resolved.tokens_per_row) + 1


def _seconds(trained: float, validated: float, shape: ModelShape, machine: Machine) -> float:
    # Forward 2, gradient of the activations 2 operations per parameter and token; frozen weights get no gradient.
    operations = shape.linear_parameters * (4 * trained + 2 * validated)
    return round(SECONDS_TO_START + operations / (machine.matmul_flops * USEFUL_SHARE), 1)


def _refuse_what_cannot_fit(plan: TrainingPlan) -> None:
    if plan.memory_bytes <= plan.machine_memory_bytes:
        return
    row = plan.resolved.tokens_per_row
    over = plan.memory_bytes / plan.machine_memory_bytes
    raise CapacityError(
        f"This run needs about {plan.memory_bytes / 1e9:.1f} GB and the machine has "
        f"{plan.machine_memory_bytes / 1e9:.1f} GB.",
        hint=f"set tokens_per_row to {max(64, int(row / over / 1.2))} (now {row}; the longest example has "
        f"{plan.longest_example} tokens), shorten the examples, or take a smaller base model",
    )
