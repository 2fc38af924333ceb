"""``luthier demo``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from luthier.cli.present import RunView, duration, open_store, show_table


def demo(
    json_file: Path = typer.Option(None, "--json", help="Write the result to this file as data, too."),
) -> None:
    """Go the whole way on real tweets: import, train, evaluate, serve. Takes a few minutes on two cores."""
    from luthier.cli.evaluations import show_evaluation
    from luthier.cli.models import show_parity
    from luthier.workflows.demo import run_demo

    store = open_store()
    typer.echo("1,800 tweets, rated by 20 people each → a tuned SmolLM2-135M that tells their sentiment", err=True)
    with RunView() as view, view.pause_on_interrupt(store):
        model, evaluation, report = run_demo(store, view.show)
    show_evaluation(evaluation)
    show_parity(model)
    show_table("Time", report["seconds"].keys(), [[duration(value) for value in report["seconds"].values()]])
    if json_file:
        json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    typer.echo(f"\n{model.name}\n")
    typer.echo("Next:")
    typer.echo(f"  luthier chat --single {model.name}")
    typer.echo("  luthier serve          # then point the openai package at http://127.0.0.1:8000/v1")
    typer.echo(f"  luthier evaluation answers --wrong {evaluation.id}")
    typer.echo(f"  luthier model export {model.name} --to sentiment-gguf")
