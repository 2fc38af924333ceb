"""The command ``luthier``: collects the commands, and turns an expected error into a message instead of a traceback.

Command modules import workflows inside their functions, so that help answers at once.
"""

from __future__ import annotations

import sys

import typer

from luthier.cli import datasets, demo, evaluations, keys, models, runs, serving, templates, training, webhooks
from luthier.errors import LuthierError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="luthier",
    help="Tune language models on your own machine: data, training, proof that it got better, serving.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: luthier demo",
)
app.add_typer(models.app, name="model")
app.add_typer(datasets.app, name="dataset")
app.add_typer(templates.app, name="template")
app.add_typer(evaluations.app, name="evaluation")
app.add_typer(runs.app, name="run")
app.add_typer(keys.app, name="key")
app.add_typer(webhooks.app, name="webhook")
app.command("train")(training.train)
app.command("evaluate")(evaluations.evaluate)
app.command("up")(serving.up)
app.command("serve")(serving.serve)
app.command("chat")(serving.chat)
app.command("demo")(demo.demo)
app.command("worker")(runs.worker)


@app.callback(invoke_without_command=True)
def options(version: bool = typer.Option(False, "--version", help="Show the version and end.")) -> None:
    """Tune language models on your own machine."""
    if version:
        import luthier

        typer.echo(luthier.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a :class:`LuthierError` ends it with its message and status 1."""
    try:
        app()
    except LuthierError as error:
        typer.secho("Error: ", fg="red", err=True, nl=False)
        typer.echo(str(error), err=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
