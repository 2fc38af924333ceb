"""``luthier evaluate`` and ``luthier evaluation``: measure models on held-out examples, and read every answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from luthier.cli.present import Json, follow_run, moment, open_store, show_json, show_table

if TYPE_CHECKING:
    from luthier.records.evaluation import Difference, Evaluation

app = typer.Typer(no_args_is_help=True, help="Evaluations that were made, and every answer in them.")
TITLES = {"base": "base", "few_shot": "few-shot", "tuned": "tuned"}
HEADINGS = {"macro_recall": "macro recall", "macro_f1": "macro F1", "rouge_l": "ROUGE-L", "bleu": "BLEU"}
MAX_CONFUSION_COLUMNS = 5
MAX_MISTAKES_SHOWN = 10
SHOWN_METRICS = {
    "label": ("macro_recall", "accuracy", "macro_f1", "perplexity"),
    "text": ("rouge_l", "bleu", "exact_match", "perplexity"),
}


def evaluate(
    model: str = typer.Argument(None, help="A tuned model; its base, dataset and template are known."),
    base: str = typer.Option(None, help="A base model, where no tuned one is given."),
    dataset: str = typer.Option(None, help="Another dataset than the one it was trained on."),
    template: str = typer.Option(None, help="Another template than the one it was trained with."),
    few_shot: bool = typer.Option(True, help="Let the base compete with its best few-shot prompt too."),
    max_examples: int = typer.Option(500, help="How many held-out examples at most."),
    as_json: bool = Json,
) -> None:
    """Compare base, base with its best few-shot prompt, and tuned model on the same held-out examples."""
    from luthier.jobs.launch import submit
    from luthier.records.record import validated
    from luthier.workflows.evaluation import EvaluateRequest
    from luthier.workflows.training import finished_result

    store = open_store()
    request = validated(
        EvaluateRequest,
        "evaluation",
        model=store.models.get(model).name if model else None,
        base=base,
        dataset=dataset,
        template=template,
        few_shot=few_shot,
        max_examples=max_examples,
    )
    run = submit(store, "evaluate", request)
    follow_run(store, run.id, quiet=as_json)
    evaluation = store.evaluations.get(finished_result(store, run.id)["evaluation"])
    if as_json:
        show_json(evaluation)
    else:
        show_evaluation(evaluation)
        typer.echo(f"Every answer side by side: luthier evaluation answers {evaluation.id}")


@app.command("list")
def list_evaluations(as_json: bool = Json) -> None:
    """Show all evaluations, the newest first."""
    evaluations = open_store().evaluations.all()
    if as_json:
        show_json(evaluations)
        return
    rows = [
        (e.id, e.model or e.base, e.dataset, e.examples, e.metric, _best(e), moment(e.created_at)) for e in evaluations
    ]
    show_table(None, ("evaluation", "model", "dataset", "#examples", "metric", "#score", "made"), rows)


@app.command()
def show(evaluation_id: str, as_json: bool = Json) -> None:
    """Show an evaluation's table."""
    evaluation = open_store().evaluations.get(evaluation_id)
    if as_json:
        show_json(evaluation)
    else:
        show_evaluation(evaluation)


@app.command()
def answers(
    evaluation_id: str,
    wrong: bool = typer.Option(False, "--wrong", help="Only examples that the tuned model has wrong."),
    limit: int = typer.Option(20, help="How many examples."),
    as_json: bool = Json,
) -> None:
    """Show the answers of all contestants side by side."""
    from luthier.workflows.evaluation import side_by_side

    store = open_store()
    evaluation = store.evaluations.get(evaluation_id)
    rows = side_by_side(store, evaluation, wrong=wrong)
    if as_json:
        show_json(rows)
        return
    columns = ("example", "question", "expected", *evaluation.scores)
    cells = [
        (
            row["example_id"],
            row["question"],
            row["expected"],
            *(row["answers"].get(name, "") for name in evaluation.scores),
        )
        for row in rows[:limit]
    ]
    show_table(f"{len(rows)} examples", columns, cells)


def show_evaluation(evaluation: Evaluation) -> None:
    """Print a column per contestant: scores, difference to the base with its interval, tokens and seconds."""
    columns = evaluation.scores.values()
    metrics = [m for m in SHOWN_METRICS[evaluation.task] if any(m in scores.metrics for scores in columns)]
    rows: list[tuple[str, ...]] = [
        (_heading(m), *(f"{scores.metrics[m]:.3f}" if m in scores.metrics else "" for scores in columns))
        for m in metrics
    ]
    for baseline in ("base", "few_shot"):
        found = [evaluation.differences.get(f"{name}_minus_{baseline}", {}) for name in evaluation.scores]
        if any(found):
            cells = (_interval(differences.get(evaluation.metric)) for differences in found)
            rows.append((f"{_heading(evaluation.metric)} against {TITLES[baseline]} (95 %)", *cells))
    rows.append(("prompt tokens a request", *(f"{scores.prompt_tokens_per_request:.0f}" for scores in columns)))
    rows.append(("seconds a request", *(f"{scores.seconds_per_request:.3f}" for scores in columns)))
    title = f"{evaluation.examples} held-out examples of {evaluation.dataset}"
    show_table(title, ("", *(f"#{TITLES.get(name, name)}" for name in evaluation.scores)), rows)
    _show_confusion(evaluation)


def _show_confusion(evaluation: Evaluation) -> None:
    """Print what is taken for what: a table for a few labels, the most frequent mistakes for many."""
    name = "tuned" if "tuned" in evaluation.scores else "base"
    confusion = evaluation.scores[name].confusion
    if not confusion:
        return
    given = sorted({label for counts in confusion.values() for label in counts})
    if len(given) <= MAX_CONFUSION_COLUMNS:
        rows: list[tuple[object, ...]] = [
            (expected, *(counts.get(label, 0) for label in given)) for expected, counts in confusion.items()
        ]
        show_table(f"What the {name} model answers", ("expected", *(f"#{label}" for label in given)), rows)
        return
    mistakes = [
        (expected, label, count)
        for expected, counts in confusion.items()
        for label, count in counts.items()
        if label != expected
    ]
    mistakes.sort(key=lambda mistake: -mistake[2])
    title = f"Most frequent mistakes of the {name} model"
    show_table(title, ("expected", "answered", "#times"), mistakes[:MAX_MISTAKES_SHOWN])


def _heading(metric: str) -> str:
    return HEADINGS.get(metric, metric.replace("_", " "))


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.value:+.2f} ({difference.low:+.2f}…{difference.high:+.2f})"


def _best(evaluation: Evaluation) -> str:
    scores = evaluation.scores.get("tuned") or next(iter(evaluation.scores.values()))
    return f"{scores.metrics[evaluation.metric]:.3f}"
