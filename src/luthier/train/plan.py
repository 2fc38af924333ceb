"""What a training run will do, before it does it: examples, tokens, steps, memory, time, each with its reason. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from luthier.errors import CapacityError, InputError
from luthier.llm.rows import Row, pack, pack_groups, shared_prefix
from luthier.records.base_model import Machine, ModelShape
from luthier.records.objectives import product
from luthier.records.training import AUTO, AdapterShape, Derived, Measured, Resolved, TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample, TokenizedPair, Unit, sides_of, tokens_of
from luthier.templates.spool import Spooled
from luthier.train.hyperparameters import Amount, resolve
from luthier.train.memory import data_bytes, largest_base, least_need, main_memory_need, memory_need, ways_to_fit

USEFUL_SHARE = 0.4  # of the measured matrix rate that a whole training step reaches, where no step was measured
SECONDS_TO_START = 8.0
SURELY_OVER = 1.2  # what ran out of memory is taken to need so much more than there is
PADDED = Derived(
    name="batches",
    value="padded",
    reason="texts of similar length go together: this model cannot keep texts of that length apart in one row",
)


@dataclass(frozen=True)
class Material:
    """What there is to learn from: training and held-out units, and what was left out on the way.

    ``sample_prompts`` are the lengths of prompts that are answered at each validation, with up to ``sample_tokens``.
    ``epoch_weights``: a validation falls on the end of each pass, too. ``proven``: the forms of what is trained are
    compared at the end.
    """

    examples: Sequence[Unit]
    validation: Sequence[Unit]
    report: RenderReport
    test: Sequence[Unit] = ()
    sample_prompts: Sequence[int] = ()
    sample_tokens: int = 0
    epoch_weights: bool = False
    proven: bool = False


def plan_training(
    material: Material,
    config: TrainingConfig,
    shape: ModelShape,
    machine: Machine,
    start: AdapterShape | None = None,
) -> TrainingPlan:
    """Return the plan of a training run, perhaps one that goes on from an adapter (``start``).

    Where it would not fit, something is given up (:func:`smaller`).

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
    sizes = _Sizes.of(material)
    thumbs = (_weight(units, liked=True), _weight(units, liked=False)) if config.method == "kto" else (0.0, 0.0)
    amount = Amount(len(units), sizes.loss_tokens, sizes.longest, *thumbs)
    resolved, steps, reasons = resolve(config, amount, shape, machine, start)
    takes_rows = _takes_rows(resolved, shape)
    reasons += [] if takes_rows else [PADDED]
    on_gpu = machine.main_memory_bytes is not None
    resolved = _fitted(resolved, config, sizes, shape, machine, reasons)
    computed = computed_tokens(units, resolved, share=takes_rows)
    passes = list(_forward_passes(material, computed, resolved, steps, share=takes_rows))
    reasons += [passed.reason for passed in passes]
    plan = TrainingPlan(
        examples=len(units),
        validation_examples=len(material.validation),
        tokens_per_epoch=sizes.tokens,
        loss_tokens_per_epoch=sizes.loss_tokens,
        computed_tokens_per_epoch=computed,
        longest_example=sizes.longest,
        shared_prefix=_prefix(units) if takes_rows else 0,
        dropped=dict(material.report.dropped),
        truncated=material.report.truncated,
        steps=steps,
        resolved=resolved,
        memory_bytes=memory_need(resolved, shape, 0 if on_gpu else sizes.held).at(resolved.tokens_per_row),
        machine_memory_bytes=machine.memory_bytes,
        main_memory_bytes=main_memory_need(resolved, shape, sizes.held, proven=material.proven, on_gpu=on_gpu),
        machine_main_memory_bytes=machine.main_memory_bytes,
        data_bytes=sizes.held,
        forward_tokens=sum(passed.tokens for passed in passes),
        shape=shape,
        seconds=0.0,
        reasons=tuple(reasons),
    )
    rate = shape.linear_parameters * _operations(resolved, shape) / (machine.matmul_flops * USEFUL_SHARE)
    plan = plan.model_copy(update={"seconds": _seconds(plan, shape, rate)})
    refuse_what_cannot_fit(plan)
    return plan


def with_measured(plan: TrainingPlan, measured: Measured) -> TrainingPlan:
    """Return the plan with memory and time from steps that were really made, on few of its examples.

    Raises:
        CapacityError: as :func:`plan_training`.
    """
    peak = measured.peak_bytes + (plan.data_bytes if plan.machine_main_memory_bytes is None else 0)
    found = plan.model_copy(update={"measured": measured, "memory_bytes": peak})
    if plan.shape is not None:
        # A step of KTO has its pass over other answers in it, which the plan counts by itself.
        beside = 2 / _operations(plan.resolved, plan.shape) if plan.resolved.method == "kto" else 0.0
        rate = measured.seconds / (measured.tokens * (1 + beside))
        found = found.model_copy(update={"seconds": _seconds(plan, plan.shape, rate)})
    refuse_what_cannot_fit(found)
    return found


def refuse_what_cannot_fit(plan: TrainingPlan) -> None:
    """Raise where a plan needs more memory than there is.

    Raises:
        CapacityError: with what would make it fit.
    """
    if plan.memory_bytes > plan.machine_memory_bytes:
        raise CapacityError(
            f"This run needs about {plan.memory_bytes / 1e9:.1f} GB and the machine has "
            f"{plan.machine_memory_bytes / 1e9:.1f} GB free.",
            hint=_hint(plan),
        )
    free = plan.machine_memory_bytes if plan.machine_main_memory_bytes is None else plan.machine_main_memory_bytes
    if plan.main_memory_bytes > free:
        raise CapacityError(
            f"To load the base, export what it becomes and prove it (parity), this run needs about "
            f"{plan.main_memory_bytes / 1e9:.1f} GB of main memory, and {free / 1e9:.1f} GB are free.",
            hint=_main_memory_hint(plan, free),
        )


def out_of_memory(plan: TrainingPlan, detail: str) -> CapacityError:
    """Return the error of steps that found no memory, with what would make them fit, whatever the plan had thought."""
    over = max(plan.memory_bytes, int(plan.machine_memory_bytes * SURELY_OVER))
    return CapacityError(
        f"Training ran out of memory, in rows of {plan.resolved.tokens_per_row:,} tokens: {detail}",
        hint=_hint(plan.model_copy(update={"memory_bytes": over})),
    )


def _main_memory_hint(plan: TrainingPlan, free: int) -> str:
    if plan.shape is not None:
        on_gpu = plan.machine_main_memory_bytes is not None
        unproven = main_memory_need(plan.resolved, plan.shape, plan.data_bytes, proven=False, on_gpu=on_gpu)
        if unproven <= free:
            return f"set parity_prompts to 0: without the proof it needs {unproven / 1e9:.1f} GB"
    return "take a smaller base model, or a machine with more main memory"


def _hint(plan: TrainingPlan) -> str:
    if plan.shape is None:
        return "take a smaller base model"
    ways = ways_to_fit(plan, plan.shape)
    if ways:
        return ", or ".join(ways[:3])
    least, largest = least_need(plan, plan.shape), largest_base(plan, plan.shape)
    base = f"a base model of less than {largest / 1e9:.2g} billion parameters, or " if largest > 1e7 else ""
    return (
        f"no option makes it fit: it needs {least / 1e9:.1f} GB at least, with a base in 4 bits and the shortest rows; "
        f"take {base}a machine with more memory"
    )


def computed_tokens(units: Sequence[Unit], resolved: Resolved, *, share: bool) -> int:
    """Return how many tokens go through the model for these units, packed batch by batch.

    Training shuffles, and neighbours may share more than others do: here a batch is of units far from each other.
    """
    batches = math.ceil(len(units) / resolved.batch_size)
    spread = ([units[i] for i in range(first, len(units), batches)] for first in range(batches))
    return sum(_in_rows(batch, resolved, share=share) for batch in spread)


def rows_of(batch: Sequence[Unit], plan: TrainingPlan) -> list[Row]:
    """Return the rows that a batch goes through a plan's model in."""
    return _rows(batch, plan.resolved, share=plan.shape is None or _takes_rows(plan.resolved, plan.shape))


def _takes_rows(resolved: Resolved, shape: ModelShape) -> bool:
    return resolved.max_tokens <= shape.rows_up_to


def _rows(batch: Sequence[Unit], resolved: Resolved, *, share: bool) -> list[Row]:
    sides = [side for unit in batch for side in sides_of(unit)]
    if share and len(sides) > len(batch):  # pairs
        return pack_groups(sides, [(2 * i, 2 * i + 1) for i in range(len(batch))], resolved.tokens_per_row)
    return pack(sides, resolved.tokens_per_row, share=share)


def _in_rows(batch: Sequence[Unit], resolved: Resolved, *, share: bool) -> int:
    return sum(len(row.tokens) for row in _rows(batch, resolved, share=share))


@dataclass(frozen=True)
class _Sizes:
    """How long units are: of the training side in all, the longest one of every side, and the bytes of those held."""

    tokens: int
    loss_tokens: int
    longest: int
    held: int

    @classmethod
    def of(cls, material: Material) -> _Sizes:
        """Add up what there is."""
        tokens = loss_tokens = longest = units = held_tokens = 0
        for side in (material.examples, material.validation, material.test):
            in_memory = not isinstance(side, Spooled)
            for unit in side:
                mine = tokens_of(unit)
                longest = max(longest, _length(unit))
                units, held_tokens = units + in_memory, held_tokens + mine * in_memory
                if side is material.examples:
                    tokens, loss_tokens = tokens + mine, loss_tokens + _loss_tokens(unit)
        return cls(tokens, loss_tokens, longest, data_bytes(units, held_tokens))


@dataclass(frozen=True)
class _ForwardPass:
    tokens: int
    reason: Derived


def _forward_passes(
    material: Material, learned: int, resolved: Resolved, steps: int, *, share: bool
) -> Iterator[_ForwardPass]:
    """Yield what goes through the model in a run without being learned; ``learned`` tokens are learned in each pass."""

    def passed(name: str, tokens: float, reason: str) -> _ForwardPass:
        return _ForwardPass(int(tokens), Derived(name=name, value=f"{int(tokens):,} tokens", reason=reason))

    looks = validations(resolved, steps, len(material.examples), epoch_weights=material.epoch_weights)
    validated, tested = (_in_rows(side, resolved, share=share) for side in (material.validation, material.test))
    if validated:
        yield passed("validation", looks * validated, f"{looks} times the validation side, forward only")
    if tested:
        yield passed("test", tested, "the test side, once, with the best weights")
    if resolved.method == "dpo":
        reason = "every answer is asked of the model as it is before its first step"
        yield passed("reference", learned + validated + tested, reason)
    if resolved.method == "kto":
        sides = (material.examples, material.validation, material.test)
        asked = sum(tokens_of(unit) + _loss_tokens(unit) for side in sides for unit in side)
        reason = "every answer, and one to another prompt, is asked of the model as it is before its first step"
        yield passed("reference", asked, reason)
        drift = resolved.epochs * learned + looks * validated + tested
        yield passed("drift", drift, "beside each batch, answers to other prompts, forward only")
    prompts = len(material.sample_prompts)
    answered = sum(material.sample_prompts) + prompts * material.sample_tokens
    if looks and validated and prompts and product(resolved.method) == "generator":
        reason = f"{looks} times {prompts} answers: their prompts once, and each token by itself"
        yield passed("sample answers", looks * answered, reason)


def validations(resolved: Resolved, steps: int, examples: int, *, epoch_weights: bool) -> int:
    """Return how often a run is validated: at even distances, at its last step, and where asked after each pass."""
    at = {steps, *range(resolved.validate_every, steps + 1, resolved.validate_every)}
    if epoch_weights:
        ends = (-(-examples * passes // resolved.batch_size) for passes in range(1, int(resolved.epochs) + 1))
        at |= {min(end, steps) for end in ends}
    return len(at)


def _operations(resolved: Resolved, shape: ModelShape) -> float:
    """Return the operations of a training step for each linear parameter and token: forward, backward, gradients."""
    trained = {"full": 1.0, "last_layers": resolved.last_layers / shape.layers}.get(resolved.mode, 0.0)
    backward = trained if resolved.mode == "last_layers" else 1.0  # nothing goes back below what is trained
    return 2 + 2 * backward + 2 * trained + (2 * backward if resolved.recompute else 0)


def _seconds(plan: TrainingPlan, shape: ModelShape, seconds_per_token: float) -> float:
    """Return a run's time from that of a token that is learned; one that is not takes its forward pass alone."""
    trained = plan.computed_tokens_per_epoch * plan.resolved.epochs
    forward = plan.forward_tokens * 2 / _operations(plan.resolved, shape)
    return round(SECONDS_TO_START + (trained + forward) * seconds_per_token, 1)


def _fitted(
    resolved: Resolved,
    config: TrainingConfig,
    sizes: _Sizes,
    shape: ModelShape,
    machine: Machine,
    reasons: list[Derived],
) -> Resolved:
    """Return the numbers with as much given up as it takes, by the estimate, to fit the memory."""
    data = sizes.held if machine.main_memory_bytes is None else 0
    while memory_need(resolved, shape, data).at(resolved.tokens_per_row) > machine.memory_bytes:
        less = smaller(resolved, config, sizes.longest, machine)
        if less is None:
            break
        resolved, reason = less
        reasons.append(reason)
    return resolved


def smaller(
    resolved: Resolved, config: TrainingConfig, longest: int, machine: Machine
) -> tuple[Resolved, Derived] | None:
    """Return the numbers with what is given up next to fit the memory, and why; None where nothing is left to give up.

    Rows are halved first, down to the ``longest`` example; then layers are recomputed; then numbers are narrowed. What
    was given stays.
    """
    if config.tokens_per_row == AUTO and resolved.tokens_per_row > longest:
        row = max(longest, resolved.tokens_per_row // 2)
        reason = Derived(name="tokens per row", value=str(row), reason="halved to fit the memory")
        return resolved.model_copy(update={"tokens_per_row": row}), reason
    if config.recompute == AUTO and not resolved.recompute:
        text = "layers are computed again in the backward pass (a third more work) to fit the memory"
        reason = Derived(name="recompute", value="yes", reason=text)
        return resolved.model_copy(update={"recompute": True}), reason
    if config.precision == AUTO and machine.bfloat16_speed and resolved.precision == "float32":
        text = f"half of float32's memory, at {machine.bfloat16_speed:.2f} times its rate, to fit the memory"
        reason = Derived(name="precision", value="bfloat16", reason=text)
        return resolved.model_copy(update={"precision": "bfloat16"}), reason
    return None


def _prefix(units: Sequence[Unit]) -> int:
    """Return how many first tokens all examples share; pairs share theirs by twos alone."""
    return 0 if isinstance(units[0], TokenizedPair) else shared_prefix(units)  # type: ignore[arg-type]


def _weight(units: Sequence[Unit], *, liked: bool) -> float:
    thumbs = (unit for unit in units if isinstance(unit, TokenizedExample))
    return sum(unit.weight for unit in thumbs if (unit.label == 1.0) == liked)


def _loss_tokens(unit: Unit) -> int:
    return sum(sum(side.loss_mask) for side in sides_of(unit))


def _length(unit: Unit) -> int:
    """Return the fewest tokens that a row must have to hold a unit."""
    sides = sides_of(unit)
    prefix = shared_prefix(sides) if len(sides) > 1 else 0
    return prefix + sum(len(side.tokens) - prefix for side in sides)
