"""``luthier template``: save texts, and see the messages and tokens that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from luthier.cli.present import Json, console, open_store, show_json, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.workflows.templates import TokenPiece

app = typer.Typer(no_args_is_help=True, help="Templates: handlebars texts that turn fields into messages.")


@app.command()
def save(
    name: str,
    user: str = typer.Option(..., help="What the user says, such as '{{text}}'."),
    assistant: str = typer.Option("", help="What the model should answer, such as '{{label}}'; not for classifiers."),
    system: str = typer.Option(None, help="The system prompt."),
    rejected: str = typer.Option(None, help="The worse answer, to learn a preference from, such as '{{worse}}'."),
    as_json: bool = Json,
) -> None:
    """Save a template; a changed text becomes a new version."""
    from luthier.records.template import Template
    from luthier.workflows.templates import save_template

    texts = Template(system=system, user=user, assistant=assistant, rejected=rejected)
    saved = save_template(open_store(), name, texts)
    if as_json:
        show_json(saved)
    else:
        typer.echo(f"Saved {saved.reference}. See it: luthier template preview DATASET {saved.name}")


@app.command("list")
def list_templates(as_json: bool = Json) -> None:
    """Show all templates with their versions."""
    templates = open_store().templates.all()
    if as_json:
        show_json(templates)
        return
    rows = [
        (t.reference, t.template.system or "", t.template.user, t.template.assistant, t.template.rejected or "")
        for t in templates
    ]
    show_table(None, ("template", "system", "user", "assistant", "rejected"), rows)


@app.command()
def preview(
    dataset: str,
    template: str = typer.Argument(None, help="A saved template; none for a dataset of conversations."),
    base: str = typer.Option("smollm2-135m", help="The base model whose chat format is used."),
    rows: int = typer.Option(3, help="How many examples to show."),
    as_json: bool = Json,
) -> None:
    """Show what a template makes of real rows, and which tokens carry loss."""
    from luthier.workflows.templates import preview as render_preview

    store = open_store()
    texts = store.templates.get(template).template if template else None
    previews = render_preview(store, dataset, texts, base, rows=rows)
    if as_json:
        show_json(previews)
        return
    screen = console()
    for shown in previews:
        _show_pieces(screen, shown.example_id, shown.pieces)
        if shown.rejected:
            _show_pieces(screen, f"{shown.example_id}, rejected answer", shown.rejected)
        if shown.problem:
            screen.print(f"Problem: {shown.problem}", style="yellow", markup=False)
    if screen.is_terminal:
        screen.print("\nGreen tokens carry loss; the model learns nothing else.")
    else:
        screen.print(
            "\nTokens with loss: " + " ".join(repr(p.text) for s in previews[:1] for p in s.pieces if p.learned)
        )


def _show_pieces(screen: Console, title: str, pieces: Sequence[TokenPiece]) -> None:
    from rich.text import Text

    learned = sum(piece.learned for piece in pieces)
    screen.rule(f"{title}: {len(pieces)} tokens, {learned} with loss", align="left")
    line = Text()
    for piece in pieces:
        line.append(piece.text, style="bold black on green" if piece.learned else "dim")
    screen.print(line)
