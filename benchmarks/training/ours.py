"""Our side: the plan and the loop of Luthier, as a run uses them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.llm.engine.torch_model import measure_machine
from luthier.llm.rows import Row
from luthier.records.base_model import FAST_INT8, Machine, ModelShape
from luthier.records.objectives import DpoOptions, Method
from luthier.records.training import AUTO, TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample, TokenizedPair
from luthier.train.engine.loop import TrainingJob, best_adapter, train
from luthier.train.engine.objectives.preference import Dpo
from luthier.train.engine.order import Order
from luthier.train.plan import Material, plan_training, rows_of
from luthier.workflows.models import shape
from training.workloads import Tokens, real_tokens

LEARNING_RATE, RANK, ALPHA, GRADIENT_NORM, BETA = 2e-4, 16, 32.0, 1.0, 0.1
METHODS: dict[str, Method] = {"A": "supervised", "B": "supervised", "dpo": "dpo"}  # others are raw text


def has_fast_integers(machine: Machine) -> bool:
    """Return whether our best option here is to multiply in integers."""
    return (machine.int8_speed or 0.0) >= FAST_INT8


def run(prepared: dict[str, Any], steps: int, seed: int, folder: Path, *, by_default: bool) -> dict[str, Any]:
    """Train with Luthier for ``steps`` optimizer steps, by default or with the best of its options."""
    plan = _plan(prepared, steps, seed, by_default=by_default)
    units = _units(prepared["train"])
    job = TrainingJob(plan, units, [], Path(prepared["base_folder"]), prepared["base_name"], folder)
    reference = _time_reference()
    ends: list[tuple[float, float]] = []
    train(job, lambda _: ends.append((time.perf_counter(), time.process_time())), lambda: None)
    seen, size = visits(prepared, steps, seed), prepared["batch"]
    batches = [seen[first : first + size] for first in range(0, len(seen), size)]
    rows = [row for batch in batches for row in rows_of([units[i] for i in batch], plan)]
    tokens = [sum(real_tokens(prepared["train"][i]) for i in batch) for batch in batches]
    return {
        "step_ends": ends,
        "step_tokens": tokens,
        "step_examples": list(map(len, batches)),
        "computed_tokens": sum(len(row.tokens) for row in rows),
        "reference_seconds": sum(reference),
        "adapter": str(best_adapter(job)),
        "options": {**plan.resolved.model_dump(mode="json"), "shared_prefix": plan.shared_prefix},
        "arithmetic": _arithmetic(prepared, rows, sum(tokens)),
    }


def visits(prepared: dict[str, Any], steps: int, seed: int) -> list[int]:
    """Return the examples in the order in which Luthier's loop takes them; the other sides are given it."""
    order = Order(len(prepared["train"]), _plan(prepared, steps, seed).resolved)
    seen = [index for step in range(steps) for index in order.batch(step)]
    assert len(seen) == steps * prepared["batch"]
    return seen


def _time_reference() -> list[float]:
    """Return a list that takes the seconds of the pass over all pairs with the reference model."""
    seconds: list[float] = []
    prepare = Dpo.prepare

    def timed(*arguments: Any, **named: Any) -> None:
        started = time.perf_counter()
        prepare(*arguments, **named)
        seconds.append(time.perf_counter() - started)

    Dpo.prepare = timed  # type: ignore[method-assign]
    return seconds


def _plan(prepared: dict[str, Any], steps: int, seed: int, *, by_default: bool = True) -> TrainingPlan:
    batch, machine = prepared["batch"], measure_machine()
    config = TrainingConfig(
        method=METHODS.get(prepared["workload"], "raw_text"),
        epochs=(steps * batch - 0.5) / len(prepared["train"]),  # half an example less, lest rounding add a step
        batch_size=batch,
        learning_rate=LEARNING_RATE,
        warmup_share=0.0,
        schedule="constant",
        lora_rank=RANK,
        lora_alpha=ALPHA,
        max_gradient_norm=GRADIENT_NORM,
        validations=1,
        checkpoints=1,
        seed=seed,
        dpo=DpoOptions(beta=BETA),
        precision=AUTO if by_default or not has_fast_integers(machine) else "int8",
    )
    material = Material(_units(prepared["train"]), [], RenderReport())
    plan = plan_training(material, config, _shape(prepared), machine)
    assert plan.steps == steps
    return plan


def _units(examples: Sequence[Tokens]) -> list[TokenizedExample] | list[TokenizedPair]:
    if "tokens" in examples[0]:
        return [
            TokenizedExample(str(index), example["tokens"], [bool(bit) for bit in example["mask"]])
            for index, example in enumerate(examples)
        ]
    return [
        TokenizedPair(str(index), _answer(pair, "chosen"), _answer(pair, "rejected"))
        for index, pair in enumerate(examples)
    ]


def _answer(pair: Tokens, which: str) -> TokenizedExample:
    mask = [False] * len(pair["prompt"]) + [True] * len(pair[which])
    return TokenizedExample(which, pair["prompt"] + pair[which], mask)


def _shape(prepared: dict[str, Any]) -> ModelShape:
    return shape(Path(prepared["base_folder"]), prepared["parameters"])


def _arithmetic(prepared: dict[str, Any], rows: Sequence[Row], real: int) -> dict[str, float]:
    """Return the useful operations of all rows, forward and backward, where frozen weights get no gradient.

    A frozen product costs 2 operations per weight and token forward and 2 backward, an adapter's 2 and 4. Attention
    costs 4 per width and token seen forward, twice that backward. The reference of pairs is one more way forward.
    """
    sizes = _shape(prepared)
    computed = sum(len(row.tokens) for row in rows)
    seen = 0.0  # tokens that tokens look at
    for group in (group for row in rows for group in row.groups):
        seen += group.prefix * (group.prefix + 1) / 2
        seen += sum(rest * group.prefix + rest * (rest + 1) / 2 for rest in group.rest_lengths)
    key_width = sizes.width // sizes.heads * sizes.key_heads
    edges = 2 * (sizes.width + sizes.width) + 2 * (sizes.width + key_width) + 3 * (sizes.width + sizes.intermediate)
    learned = sum(len(row.targets) for row in rows)
    more = 1 if prepared["workload"] == "dpo" else 0
    operations = {
        "linear": (4.0 + 2 * more) * sizes.linear_parameters * computed,
        "adapter": (6.0 + 2 * more) * sizes.layers * RANK * edges * computed,
        "attention": (12.0 + 4 * more) * sizes.width * sizes.layers * seen,
        "vocabulary": (4.0 + 2 * more) * sizes.vocabulary * sizes.width * learned,
    }
    return {
        **{f"{name}_flop_per_computed_token": value / computed for name, value in operations.items()},
        "flop_per_computed_token": sum(operations.values()) / computed,
        "flop_per_real_token": sum(operations.values()) / real,
    }
