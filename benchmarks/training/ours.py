"""Our side: the plan and the loop of Luthier, as a run uses them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.llm.engine.torch_model import measure_machine
from luthier.llm.rows import computed_tokens
from luthier.records.base_model import Machine, ModelShape
from luthier.records.training import TrainingConfig, TrainingPlan
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.engine.loop import TrainingJob, _Order, best_adapter, train
from luthier.train.plan import plan_training
from luthier.workflows.models import shape
from training.workloads import loss_tokens, real_tokens

LEARNING_RATE, RANK, ALPHA, GRADIENT_NORM, BETA = 2e-4, 16, 32.0, 1.0, 0.1


def run(prepared: dict[str, Any], steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train with Luthier for ``steps`` optimizer steps."""
    side = _ours_dpo if prepared["workload"] == "dpo" else _ours_supervised
    return side(prepared, steps, seed, folder)


def visits(prepared: dict[str, Any], steps: int, seed: int) -> list[int]:
    """Return the examples in the order in which Luthier's loop takes them; the other sides are given it."""
    count = len(prepared["train"])
    order = _Order(count, _plan(prepared, steps, seed).resolved)
    seen = [index for step in range(steps) for index in order.batch(step)]
    assert len(seen) == steps * prepared["batch"]
    return seen


def _ours_supervised(prepared: dict[str, Any], steps: int, seed: int, folder: Path) -> dict[str, Any]:
    machine = measure_machine()
    plan = _plan(prepared, steps, seed, machine)
    examples = _examples(prepared["train"])
    job = TrainingJob(plan, examples, [], Path(prepared["base_folder"]), prepared["base_name"], folder)
    ends: list[tuple[float, float]] = []
    train(job, lambda _: ends.append((time.perf_counter(), time.process_time())), lambda: None)
    seen = visits(prepared, steps, seed)
    batches = [seen[first : first + prepared["batch"]] for first in range(0, len(seen), prepared["batch"])]
    row, prefix = plan.resolved.tokens_per_row, plan.shared_prefix
    visited = [examples[index] for index in seen]
    computed = computed_tokens(visited, prefix, row, prepared["batch"])
    options = plan.resolved.model_dump(mode="json")
    return {
        "step_ends": ends,
        "step_tokens": [sum(real_tokens(prepared["train"][i]) for i in batch) for batch in batches],
        "step_examples": list(map(len, batches)),
        "computed_tokens": computed,
        "adapter": str(best_adapter(job)),
        "options": {**options, "shared_prefix": prefix},
        "arithmetic": _arithmetic(prepared, visited, seen, prefix, computed, machine),
    }


def _ours_dpo(prepared: dict[str, Any], steps: int, seed: int, folder: Path) -> dict[str, Any]:
    raise NotImplementedError("Luthier's preference training is not part of this benchmark: use --only trl_best.")


def _plan(prepared: dict[str, Any], steps: int, seed: int, machine: Machine | None = None) -> TrainingPlan:
    count, batch = len(prepared["train"]), prepared["batch"]
    config = TrainingConfig(
        epochs=(steps * batch - 0.5) / count,  # half an example less, lest rounding add a step
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
    )
    machine = machine or Machine(cores=1, memory_bytes=2**50, has_fast_bfloat16=False, matmul_flops=1.0)
    plan = plan_training(_examples(prepared["train"]), [], RenderReport(), config, _shape(prepared), machine)
    assert plan.steps == steps
    return plan


def _examples(examples: Sequence[dict[str, list[int]]]) -> list[TokenizedExample]:
    """Return examples as the loop takes them; of a pair its chosen answer, which is enough to plan."""
    return [
        TokenizedExample(str(index), example["tokens"], [bool(bit) for bit in example["mask"]])
        if "tokens" in example
        else TokenizedExample(
            str(index),
            example["prompt"] + example["chosen"],
            [False] * len(example["prompt"]) + [True] * len(example["chosen"]),
        )
        for index, example in enumerate(examples)
    ]


def _shape(prepared: dict[str, Any]) -> ModelShape:
    return shape(Path(prepared["base_folder"]), prepared["parameters"])


def _arithmetic(
    prepared: dict[str, Any],
    visited: list[TokenizedExample],
    seen: list[int],
    prefix: int,
    computed: int,
    machine: Machine,
) -> dict[str, float]:
    """Return the useful operations of all steps, forward and backward, where frozen weights get no gradient.

    A frozen product costs 2 operations per weight and token forward and 2 backward, an adapter's 2 and 4. Attention
    costs 4 per width and token seen forward, twice that backward.
    """
    sizes = _shape(prepared)
    rests = sum(len(example.tokens) - prefix for example in visited)
    prefixes = (computed - rests) / prefix if prefix else 0.0  # times that the shared prefix was computed
    own = [(prefix + 1 + len(example.tokens)) / 2 * (len(example.tokens) - prefix) for example in visited]
    seen_tokens = sum(own) + prefixes * prefix * (prefix + 1) / 2
    learned = sum(loss_tokens(prepared["train"][index]) for index in seen)
    key_width = sizes.width // sizes.heads * sizes.key_heads
    inputs_and_outputs = 2 * (sizes.width + sizes.width) + 2 * (sizes.width + key_width)
    adapter = sizes.layers * RANK * (inputs_and_outputs + 3 * (sizes.width + sizes.intermediate))
    operations = {
        "linear": 4.0 * sizes.linear_parameters * computed,
        "adapter": 6.0 * adapter * computed,
        "attention": 12.0 * sizes.width * sizes.layers * seen_tokens,
        "vocabulary": 4.0 * sizes.vocabulary * sizes.width * learned,
    }
    total = sum(operations.values())
    return {
        **{f"{name}_flop_per_computed_token": value / computed for name, value in operations.items()},
        "flop_per_computed_token": total / computed,
        "flop_per_step": total / (len(seen) / prepared["batch"]),
        "machine_matmul_flops": machine.matmul_flops,
    }
