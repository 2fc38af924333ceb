"""Tune a model through OpenAI's API, and ask it: the program that one would write for OpenAI.

It runs unchanged against Luthier with two environment variables:

    luthier up                                              # in another terminal
    export OPENAI_BASE_URL=http://127.0.0.1:8000/v1
    export OPENAI_API_KEY=none                              # or a key of `luthier key create`
    python examples/openai_finetune.py [--model gpt-4o-mini] [--data FILE.csv] [--text COLUMN] [--label COLUMN]

In the end the model and its tuned one are each asked about 100 rows that they never saw (`--test N`), 8 at a time.
`gpt-4o-mini` is answered by the base that LUTHIER_STAND_INS names, such as `gpt-4o-mini*=smollm2-135m`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

TWEETS = Path(__file__).parent.parent / "src" / "luthier" / "demo_data" / "tweets.csv"
INSTRUCTION = "Say whether the message is positive, negative or neutral. Answer with one word."
VALIDATION = 100
ASKED_AT_ONCE = 8
FINISHED = ("succeeded", "failed", "cancelled")
Row = tuple[str, str]


def main() -> None:
    """Upload, tune, follow, ask, compare."""
    options = arguments()
    client = OpenAI()
    rows = read_rows(options.data, options.text, options.label)
    rest, test = rows[: -options.test], rows[-options.test :]
    train, validation = rest[:-VALIDATION][: options.examples], rest[-VALIDATION:]
    if not train:
        raise SystemExit(
            f"{options.data} has {len(rows)} rows: too few for {VALIDATION} to validate, {options.test} to test"
        )

    files = {
        side: client.files.create(file=(f"{side}.jsonl", as_jsonl(part)), purpose="fine-tune").id
        for side, part in (("train", train), ("validation", validation))
    }
    job = client.fine_tuning.jobs.create(
        model=options.model,
        training_file=files["train"],
        validation_file=files["validation"],
        suffix="sentiment",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": options.epochs}}},
        metadata={"example": "openai_finetune"},
    )
    print(f"job {job.id} on {job.model}")
    job = follow(client, job.id)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        raise SystemExit(f"the job has {job.status}: {job.error.message if job.error else ''}")

    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
        print(f"checkpoint {checkpoint.fine_tuned_model_checkpoint}: loss {checkpoint.metrics.valid_loss}")
    metrics = client.files.content(job.result_files[0]).text
    print(f"{job.result_files[0]}: {len(metrics.splitlines()) - 1} steps")
    for name in (options.model, job.fine_tuned_model):
        print(f"{name}: {accuracy(client, name, test):.0%} of {len(test)} right")


def follow(client: OpenAI, job_id: str):
    """Print the job's events until it ends, and return it."""
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        for event in reversed(list(client.fine_tuning.jobs.list_events(job_id, limit=100).data)):
            if event.id not in seen:
                seen.add(event.id)
                print(f"  {event.message}")
        if job.status in FINISHED:
            return job
        time.sleep(2)


def accuracy(client: OpenAI, model: str, rows: Sequence[Row]) -> float:
    """Return the share of rows that a model labels as their column does."""

    def is_right(row: Row) -> bool:
        text, label = row
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=5)
        return (answer.choices[0].message.content or "").strip().lower() == label.lower()

    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        return sum(threads.map(is_right, rows)) / len(rows)


def as_jsonl(rows: Sequence[Row]) -> io.BytesIO:
    """Return rows as OpenAI's chat format, one JSON object a line."""
    lines = []
    for text, label in rows:
        turns = (("system", INSTRUCTION), ("user", text), ("assistant", label))
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    return io.BytesIO("\n".join(lines).encode())


def read_rows(path: Path, text: str, label: str) -> list[Row]:
    """Return (text, label) of every row, in an order that is mixed and always the same."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row[text], row[label]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    return rows


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-4o-mini")
    parser.add_argument("--data", type=Path, default=TWEETS)
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="sentiment")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--test", type=int, default=100, help="how many rows each model is asked about in the end")
    options = parser.parse_args()
    if options.test < 1:
        parser.error(f"--test is {options.test}, and must be 1 or more")
    return options


if __name__ == "__main__":
    main()
