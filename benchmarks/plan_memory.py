"""Compares the memory that a plan estimates from sizes alone with that of steps that are really made, for each mode.

``python benchmarks/plan_memory.py --home HOME``: the home holds the base smollm2-135m (``luthier model pull``).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.llm.engine.torch_model import measure_machine
from luthier.records.training import TrainingConfig
from luthier.store.store import Store
from luthier.templates.renderer import RenderReport, TokenizedExample
from luthier.train.engine.loop import TrainingJob
from luthier.train.engine.probe import measured_plan
from luthier.train.plan import Material, plan_training
from luthier.workflows.models import shape

TOKENS = 250  # of an example; four fill a row
RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, layers recomputed": {"recompute": True},
    "lora, float32": {"precision": "float32"},
    "lora, dropout": {"lora_dropout": 0.1},
    "dora": {"mode": "dora"},
    "dora, layers recomputed": {"mode": "dora", "recompute": True},
    "qlora": {"mode": "qlora"},
    "last_layers": {"mode": "last_layers"},
    "full": {"mode": "full"},
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    arguments = parser.parse_args()
    store = Store(arguments.home)
    info = store.models.base(arguments.base)
    folder = store.models.base_folder(info)
    draw = random.Random(0)
    mask = [False] * 150 + [True] * (TOKENS - 150)
    units = [TokenizedExample(str(i), [draw.randrange(3, 40_000) for _ in mask], mask) for i in range(40)]
    machine, sizes = measure_machine(), shape(folder, info.parameters)
    print("| run | estimated | measured | ratio |\n|---|---|---|---|")
    for name, options in RUNS.items():
        config = TrainingConfig.model_validate({"tokens_per_row": 1024, **options})
        plan = plan_training(Material(units, units[:4], RenderReport()), config, sizes, machine)
        with TemporaryDirectory() as scratch:
            job = TrainingJob(plan, units, units[:4], folder, info.id, Path(scratch), base_sha256=info.sha256)
            found = measured_plan(job, config, machine)
        estimated, measured = plan.memory_bytes / 1e9, found.memory_bytes / 1e9
        print(f"| {name} | {estimated:.2f} GB | {measured:.2f} GB | {estimated / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
