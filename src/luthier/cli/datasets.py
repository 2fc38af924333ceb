"""``luthier dataset``: import, divide, look, delete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from luthier.cli.present import Json, console, moment, open_store, show_json, show_table, size

if TYPE_CHECKING:
    from luthier.records.dataset import DatasetVersion
    from luthier.records.example import Example

app = typer.Typer(no_args_is_help=True, help="Datasets: import a file, divide it, look at it, delete it.")


@app.command("import")
def import_file(
    path: Path = typer.Argument(
        ..., help="A CSV, JSONL (fields, chat or preferences) or text file, or a folder of texts."
    ),
    name: str = typer.Option(None, "--name", "-n", help="The dataset's name; the file's name where not given."),
    kind: str = typer.Option(None, "--format", help="csv, jsonl, chat or text; detected where not given."),
    encoding: str = typer.Option(None, help="Text encoding; detected where not given."),
    delimiter: str = typer.Option(None, help="Column separator of a CSV file; detected where not given."),
    as_json: bool = Json,
) -> None:
    """Import a file as a new version of a dataset. Bad rows are left out and listed."""
    from rich.progress import Progress

    from luthier.workflows.datasets import import_dataset

    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"Importing {path.name}", total=None)
        dataset = import_dataset(
            open_store(),
            path,
            name or path.stem,
            kind=kind,  # type: ignore[arg-type]
            encoding=encoding,
            delimiter=delimiter,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _show_import(dataset, as_json)


@app.command("import-completions")
def import_log(
    name: str = typer.Argument(..., help="The dataset's name."),
    project: str = typer.Option("default", help="Whose stored completions."),
    model: str = typer.Option(None, help="Only answers of this model, by the name that was asked."),
    metadata: list[str] = typer.Option([], help="Only those with this label: KEY=VALUE. May be repeated."),
    as_json: bool = Json,
) -> None:
    """Make a dataset of what was asked with store=True, and answered. Labels become fields."""
    from luthier.errors import InputError
    from luthier.workflows.datasets import import_completions

    labels = dict(text.split("=", 1) for text in metadata if "=" in text)
    if len(labels) < len(metadata):
        raise InputError(f"--metadata takes KEY=VALUE, each key once; not {', '.join(metadata)}.")
    _show_import(import_completions(open_store(), name, project=project, model=model, metadata=labels), as_json)


def _show_import(dataset: DatasetVersion, as_json: bool) -> None:
    if as_json:
        show_json(dataset)
        return
    report = dataset.report
    if report:
        typer.echo(f"{dataset.reference}: {report.taken:,} examples taken, {report.left:,} rows left out.")
        typer.echo(f"Read as {report.format.kind}, {report.format.encoding}. Fields: {', '.join(report.fields)}")
        for row in report.bad_rows[:20]:
            typer.secho(f"  line {row.line}: {row.reason}", fg="yellow")
        if report.left > 20:
            typer.echo(f"  … and {report.left - 20:,} more (luthier dataset show {dataset.reference} --json)")
    typer.echo(f"Next: luthier dataset split {dataset.name}   (with --label FIELD where a field holds labels)")


@app.command()
def split(
    dataset: str = typer.Argument(..., help="A dataset: name, or name@version."),
    validation: float = typer.Option(0.1, help="Share for choosing while training."),
    test: float = typer.Option(0.1, help="Share that is kept for the proof."),
    label: str = typer.Option(None, help="Keep the shares for every value of this field."),
    seed: int = typer.Option(0, help="The same seed gives the same sides."),
    near: float = typer.Option(0.8, help="Texts at least this similar stay on one side; 0 looks for equal ones only."),
    column: str = typer.Option(None, help="A field that says the side: train, validation or test."),
    as_json: bool = Json,
) -> None:
    """Divide a dataset into train, validation and test; duplicates stay on one side."""
    from luthier.records.dataset import SplitConfig
    from luthier.records.record import validated
    from luthier.workflows.datasets import split_dataset

    values = {"validation": validation, "test": test, "label": label, "seed": seed, "column": column}
    config = validated(SplitConfig, "split", **values, near_duplicate_similarity=near or None)
    made = split_dataset(open_store(), dataset, config)
    if as_json:
        show_json(made)
        return
    assert made.split is not None  # noqa: S101 - split_dataset has just made it
    report = made.split
    sides = list(report.counts)
    rows: list[tuple[str, ...]] = [("all", *(f"{report.counts[side]:,}" for side in sides))]
    for value in sorted({name for counts in report.label_counts.values() for name in counts}):
        rows.append((value, *(f"{report.label_counts.get(side, {}).get(value, 0):,}" for side in sides)))
    show_table(made.reference, (label or "examples", *(f"#{side}" for side in sides)), rows)
    typer.echo(f"Kept together: {report.exact_duplicates:,} exact and {report.near_duplicates:,} near duplicates.")
    typer.echo(f"Next: luthier template save NAME …, then luthier train {made.name} --template NAME --plan")


@app.command("list")
def list_datasets(as_json: bool = Json) -> None:
    """Show all datasets with their versions."""
    datasets = open_store().datasets.all()
    if as_json:
        show_json(datasets)
        return
    rows = [
        (d.reference, d.kind, f"{d.examples:,}", ", ".join(d.fields), "yes" if d.split else "no", moment(d.created_at))
        for d in datasets
    ]
    show_table(None, ("dataset", "kind", "#examples", "fields", "divided", "made"), rows)


@app.command()
def show(
    dataset: str,
    rows: int = typer.Option(5, help="How many examples to show."),
    as_json: bool = Json,
) -> None:
    """Show a dataset's record and its first examples."""
    from itertools import islice

    store = open_store()
    version = store.datasets.get(dataset)
    examples = list(islice(store.datasets.examples(version), rows))
    if as_json:
        show_json({"dataset": version, "examples": examples})
        return
    typer.echo(f"{version.reference}: {version.examples:,} examples from {version.source}")
    typer.echo(f"content sha256 {version.content_hash}")
    if version.split:
        typer.echo(", ".join(f"{side}: {count:,}" for side, count in version.split.counts.items()))
    for example in examples:
        show_table(f"{example.id} ({example.split or 'not divided'})", ("field", "value"), _values(example))


@app.command()
def delete(
    name: str = typer.Argument(..., help="A dataset; all its versions go."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask first."),
    as_json: bool = Json,
) -> None:
    """Delete a dataset, unless a tuned model was trained on it or a run still needs it."""
    from luthier.workflows.datasets import dataset_bytes, delete_dataset

    store = open_store()
    freed = dataset_bytes(store, name)
    if not yes:
        versions = ", ".join(version.reference for version in store.datasets.versions(name))
        typer.confirm(f"Delete {versions}? That frees {size(freed)}.", abort=True, err=True)
    delete_dataset(store, name)
    if as_json:
        show_json({"deleted": name, "freed_bytes": freed})
        return
    typer.echo(f"{name} is deleted; {size(freed)} are free.")


def _values(example: Example) -> list[tuple[str, object]]:
    turns: list[tuple[str, object]] = [(turn.role, turn.whole_text) for turn in example.messages or ()]
    turns += [("rejected", turn.whole_text) for turn in example.rejected or ()]
    return turns + list(example.fields.items())
