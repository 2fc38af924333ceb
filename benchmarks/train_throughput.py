"""Training throughput on the demo's tweets: `python benchmarks/train_throughput.py [--steps 30] [--json FILE]`.

Counts real tokens (each example's own, as if nothing were shared) and computed ones (each row's) per second of wall
time over the steps after the first three; three repeats in one process, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import luthier
from luthier.llm.engine.torch_model import measure_machine
from luthier.llm.rows import computed_tokens
from luthier.records.dataset import SplitConfig
from luthier.records.template import Template
from luthier.records.training import StepMetrics, TrainingConfig
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import RenderPolicy, TemplateRenderer, tokenize
from luthier.train.engine.loop import TrainingJob, train
from luthier.train.plan import plan_training
from luthier.workflows.datasets import import_dataset, side, split_dataset
from luthier.workflows.models import pull, shape

WARM_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=None, help="a home that has the base model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        job = make_job(Store(options.home or Path(temporary) / "home"), Path(temporary))
        plan = job.plan.model_copy(update={"steps": options.steps})
        rates = []
        for repeat in range(options.repeats):
            seen: list[StepMetrics] = []
            run = TrainingJob(plan, job.examples, [], job.base_folder, job.base_name, Path(temporary) / str(repeat))
            train(run, seen.append, lambda: None)
            rates.append(statistics.median(step.tokens_per_second for step in seen[WARM_STEPS:]))
    share = plan.computed_tokens_per_epoch / plan.tokens_per_epoch
    result = {
        "machine": measure_machine().model_dump(mode="json"),
        "real_tokens_per_second": statistics.median(rates),
        "computed_tokens_per_second": statistics.median(rates) * share,
        "lowest": min(rates),
        "highest": max(rates),
        "precision": plan.resolved.precision,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def make_job(store: Store, folder: Path) -> TrainingJob:
    """Prepare the demo's training without starting it."""
    base = pull(store, "smollm2-135m")
    base_folder = store.models.base_folder(base)
    import_dataset(store, Path(luthier.__file__).parent / "demo_data" / "tweets.csv", "tweets")
    dataset = split_dataset(store, "tweets", SplitConfig(validation=0.05, test=0.28, label="sentiment"))
    template = Template(
        system="Classify the sentiment of the tweet as negative, neutral or positive. Answer with one word.",
        user="{{text}}",
        assistant="{{sentiment}}",
    )
    renderer = TemplateRenderer(template, dataset.fields)
    conversations = [renderer.conversation(example) for example in side(store, dataset, "train")]
    examples, report = tokenize(conversations, ChatFormat.load(base_folder), RenderPolicy(max_tokens=4096))
    sizes = shape(base_folder, base.parameters)
    plan = plan_training(examples, [], report, TrainingConfig(checkpoints=1), sizes, measure_machine())
    assert plan.computed_tokens_per_epoch == computed_tokens(
        examples, plan.shared_prefix, plan.resolved.tokens_per_row, plan.resolved.batch_size
    )
    return TrainingJob(plan, examples, [], base_folder, base.id, folder)


if __name__ == "__main__":
    main()
