"""The demo: real tweets → examples → a tuned model → proof that it is better, in one sitting of code.

Copy this file and change it: every step is one call of the public Python API.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import luthier
from luthier.jobs.launch import OnEvent
from luthier.records.dataset import SplitConfig
from luthier.records.evaluation import Evaluation
from luthier.records.model import TunedModel
from luthier.records.template import Template
from luthier.store.store import Store
from luthier.workflows.datasets import import_dataset, split_dataset
from luthier.workflows.evaluation import EvaluateRequest, evaluate_model
from luthier.workflows.models import pull
from luthier.workflows.templates import save_template
from luthier.workflows.training import TrainRequest, train_model

TWEETS = Path(luthier.__file__).parent / "demo_data" / "tweets.csv"
BASE = "smollm2-135m"


def run_demo(store: Store, on_event: OnEvent | None = None) -> tuple[TunedModel, Evaluation, dict[str, Any]]:
    """Go the whole way once; return the model, its evaluation, and both with the times of each stage as data."""
    started = time.monotonic()
    pull(store, BASE)

    imported_at = time.monotonic()
    import_dataset(store, TWEETS, "tweets")
    dataset = split_dataset(store, "tweets", SplitConfig(validation=0.05, test=0.28, label="sentiment"))
    template = save_template(
        store,
        "sentiment",
        Template(
            system="Classify the sentiment of the tweet as negative, neutral or positive. Answer with one word.",
            user="{{text}}",
            assistant="{{sentiment}}",
        ),
    )
    import_seconds = time.monotonic() - imported_at

    model = train_model(
        store,
        TrainRequest(base=BASE, dataset=dataset.reference, template=template.reference, suffix="sentiment"),
        on_event,
    )
    evaluation = evaluate_model(store, EvaluateRequest(model=model.name), on_event)

    stages = stage_seconds(store, model.run_id)
    seconds = {
        "pull": imported_at - started,
        "import": import_seconds,
        "train": stages["train"],
        "export": stages["export"],
        "parity": stages["parity"],
        "evaluate": evaluation.seconds,
        "total": time.monotonic() - started,
    }
    return model, evaluation, report(model, evaluation, seconds)


def stage_seconds(store: Store, run_id: str) -> dict[str, float]:
    """Return how long each finished stage of a run took."""
    events = store.runs.events(run_id, type="stage")
    return {event.data["stage"]: event.data["seconds"] for event in events if "seconds" in event.data}


def report(model: TunedModel, evaluation: Evaluation, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the demo's result as plain data, for ``luthier demo --json FILE``."""
    contestants = {
        name: {
            **scores.metrics,
            "prompt_tokens_per_request": scores.prompt_tokens_per_request,
            "completion_tokens_per_request": scores.completion_tokens_per_request,
            "seconds_per_request": scores.seconds_per_request,
        }
        for name, scores in evaluation.scores.items()
    }
    metric = evaluation.metric
    difference = {
        pair: {metric: found[metric].value, "low": found[metric].low, "high": found[metric].high}
        for pair, found in evaluation.differences.items()
    }
    return {
        "contestants": contestants,
        "difference": difference,
        "parity": model.parity.model_dump(mode="json") if model.parity else None,
        "training": model.training.model_dump(mode="json"),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "model": model.name,
    }
