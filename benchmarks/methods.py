"""Every training method on real data, once: `python benchmarks/methods.py --data FOLDER [--only NAME,…] [--json FILE]`.

`FOLDER` has public data sets, each in a folder of its own: pandalm_human_prefs, medquad, banking77, vader_tweets,
legal_federal_opinions (docs/measurements.md names their origins). A method's examples are drawn with seed 0, imported
and trained on in a run as a user starts one. Its figures come from that run: from the validation side at the first and
at the best step, and from the test side once, with the weights of the best step.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.records.dataset import SplitConfig
from luthier.records.training import TrainingConfig
from luthier.store.store import Store
from luthier.workflows.datasets import import_dataset, split_dataset
from luthier.workflows.models import pull
from luthier.workflows.training import TrainRequest, train_model

Rows = list[dict[str, Any]]
csv.field_size_limit(2**24)


@dataclass(frozen=True)
class Trial:
    """A method's rows (with their side in ``split``), its base, and the options that a user would give."""

    title: str
    rows: Callable[[Path], Rows]
    base: str
    options: dict[str, Any]


def preferences(data: Path) -> Rows:
    """Pairs of answers of which at least two of three people preferred one."""
    rows = []
    for item in json.loads((data / "pandalm_human_prefs" / "testset-v1.json").read_text("utf-8")):
        votes = [item[f"annotator{number}"] for number in (1, 2, 3)]
        better = next((side for side in (1, 2) if votes.count(side) >= 2), None)
        answers = {side: str(item[f"response{side}"]).strip() for side in (1, 2)}
        if better is None or answers[1] == answers[2] or not all(answers.values()):
            continue
        prompt = "\n\n".join(filter(None, (item["instruction"], item["input"])))
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": answers[better]}],
                "rejected": [{"role": "assistant", "content": answers[3 - better]}],
            }
        )
    return divided(rows, validation=80, test=80)


def thumbs(data: Path) -> Rows:
    """Answers that people graded for other people's medical questions: 1 (incorrect) is a thumb down, 3 and 4 are up.

    The data has the graded answers, each behind the question that it was written for, and not what was asked. So the
    prompt is the question that the best graded answer was written for; where none is excellent (4), it is left out.
    """
    with zipfile.ZipFile(data / "medquad" / "LiveQA-Med-Qrels.zip") as archive:
        names = [name for name in archive.namelist() if not name.startswith("__")]
        grades, answers = (
            archive.read(next(name for name in names if part in name)).decode("utf-8", "replace")
            for part in ("qrels", "Answers-retrieved")
        )
    texts = {row["AnswerID"]: row["Answer"].partition("Answer:") for row in csv.DictReader(io.StringIO(answers))}
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line in grades.splitlines():
        asked_id, grade, answer_id = line.split()[:3]
        if answer_id in texts and texts[answer_id][2].strip():
            asked[asked_id].append((grade[0], answer_id))
    sides, rows = ["train"] * 8 + ["validation", "test"], list[dict[str, Any]]()
    for graded in asked.values():
        best = next((texts[answer][0] for grade, answer in graded if grade == "4"), None)
        if best is None:
            continue
        question = best.partition("Question:")[2].partition("(Also called")[0].partition("URL:")[0].strip()
        side = random.Random(question).choice(sides)  # no question is on two sides
        for grade, answer in graded:
            if grade in "134":
                text = " ".join(texts[answer][2].split()[:120])
                rows.append(
                    {"question": question, "answer": text, "thumb": "down" if grade == "1" else "up", "split": side}
                )
    unique = list({(row["question"], row["answer"]): row for row in rows}.values())
    random.Random(0).shuffle(unique)
    return unique


def intents(data: Path) -> Rows:
    """banking77 as it is divided by its authors; a tenth of the training side is held out to choose the best step."""
    sides: dict[str, Rows] = {}
    for side in ("train", "test"):
        with (data / "banking77" / f"{side}.csv").open(newline="", encoding="utf-8") as file:
            sides[side] = [
                {"text": row["text"], "label": row["category"], "split": side} for row in csv.DictReader(file)
            ]
    random.Random(0).shuffle(sides["train"])
    for row in sides["train"][::10]:
        row["split"] = "validation"
    return [*sides["train"], *sides["test"]]


def ratings(data: Path) -> Rows:
    """Tweets with the mean rating of 20 people, from -4 to 4."""
    lines = (data / "vader_tweets" / "tweets_GroundTruth.txt").read_text("utf-8", "replace").splitlines()
    rows = [{"text": text, "label": float(rating)} for _, rating, text in (line.split("\t", 2) for line in lines)]
    return divided(rows, validation=300, test=600)


def documents(data: Path) -> Rows:
    """Opinions of US courts, cut to their first 12,000 letters."""
    with gzip.open(data / "legal_federal_opinions" / "opinions.csv.gz", "rt", encoding="utf-8") as file:
        rows = [{"text": row["text"][:12_000]} for row in csv.DictReader(file) if len(row["text"]) > 4_000]
    random.Random(0).shuffle(rows)
    return divided(rows[:80], validation=8, test=8)


def divided(rows: Rows, *, validation: int, test: int) -> Rows:
    """Return rows in a mixed order, each with its side."""
    random.Random(0).shuffle(rows)
    sides = ["validation"] * validation + ["test"] * test
    return [{**row, "split": sides[i] if i < len(sides) else "train"} for i, row in enumerate(rows)]


SMALL, ENCODER = "smollm2-135m", "minilm-l6"
SHORT = {"max_tokens": 512, "too_long": "drop"}
TRIALS = {
    "dpo": Trial("pandalm_human_prefs", preferences, SMALL, {"method": "dpo", "epochs": 2, **SHORT}),
    "orpo": Trial("pandalm_human_prefs", preferences, SMALL, {"method": "orpo", "epochs": 2, **SHORT}),
    "reward": Trial("pandalm_human_prefs", preferences, SMALL, {"method": "reward", "epochs": 2, **SHORT}),
    "kto": Trial("medquad, graded answers", thumbs, SMALL, {"method": "kto", "epochs": 1, **SHORT}),
    "raw_text": Trial("legal_federal_opinions", documents, SMALL, {"method": "raw_text", "epochs": 1}),
    "classification": Trial("banking77", intents, ENCODER, {"method": "classification", "mode": "full", "epochs": 5}),
    "regression": Trial("vader_tweets", ratings, ENCODER, {"method": "regression", "mode": "full", "epochs": 3}),
}
COLUMNS = {"kto": {"thumb": "thumb"}, "raw_text": {"text": "text"}}
LABELLED = {"label": "label", "text": "text"}


def main() -> None:
    options = _options()
    found = {}
    with TemporaryDirectory() as temporary:
        store = Store(options.home or Path(temporary) / "home")
        for base in sorted({TRIALS[name].base for name in options.only}):
            pull(store, base)
        for name in options.only:
            found[name] = run(store, name, options.data, Path(temporary), options.precision)
            print(f"{name:16} {json.dumps(found[name])}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def run(store: Store, name: str, data: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Import, divide and train; return what the run found."""
    trial = TRIALS[name]
    numbers = {} if trial.options.get("mode") == "full" else {"precision": precision}
    path = folder / f"{name}.jsonl"
    rows = trial.rows(data)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    import_dataset(store, path, name)
    dataset = split_dataset(store, name, SplitConfig(column="split"))
    columns = LABELLED if trial.base == ENCODER else COLUMNS.get(name, {})
    config = TrainingConfig.model_validate({**trial.options, **numbers, "columns": columns, "samples": 0})
    template = _template(store) if name == "kto" else None
    history: list[dict[str, Any]] = []
    started = time.monotonic()
    model = train_model(
        store,
        TrainRequest(base=trial.base, dataset=dataset.reference, template=template, suffix=name, options=config),
        lambda event: history.append(event.data) if event.type == "metrics" else None,
    )
    result = model.training
    validated = [step for step in history if step.get("valid_loss") is not None]
    counts = _counts(rows)
    return {
        "data": trial.title,
        "base": trial.base,
        "examples": counts,
        "steps": result.steps,
        "first_valid": _figures(validated[0]["valid_loss"], validated[0]["valid_metrics"]) if validated else None,
        "best_valid": _figures(result.best_valid_loss, result.valid_metrics),
        "test": {key: round(value, 4) for key, value in result.test_metrics.items()},
        "tokens_per_second": round(result.tokens_per_second),
        "seconds": round(time.monotonic() - started),
        "peak_memory_gb": round(result.peak_memory_bytes / 1e9, 2),
    }


def _template(store: Store) -> str:
    from luthier.records.template import Template
    from luthier.workflows.templates import save_template

    return save_template(store, "thumbs", Template(user="{{question}}", assistant="{{answer}}")).reference


def _counts(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["split"]] += 1
    return dict(counts)


def _figures(loss: float | None, metrics: dict[str, float]) -> dict[str, float]:
    shown = {"loss": loss or 0.0, **metrics}
    return {key: round(value, 4) for key, value in shown.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--home", type=Path, help="a home that has the base models; a temporary one where not given")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(TRIALS), help=", ".join(TRIALS))
    parser.add_argument("--precision", default="auto", help="of methods that train an adapter: int8, say")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
