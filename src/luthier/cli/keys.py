"""``luthier key``: who may call the service."""

from __future__ import annotations

from datetime import UTC, datetime

import typer

from luthier.cli.present import Json, moment, open_store, show_json, show_table
from luthier.records.scopes import DEFAULT_PROJECT, SCOPES, Scope

USUAL = "0 is no bound; the service's default where not given."

app = typer.Typer(no_args_is_help=True, help="Keys: who may call the service, and what with.")


@app.command()
def create(
    name: str = typer.Argument(..., help="What it is for, such as the program that will use it."),
    project: str = typer.Option(DEFAULT_PROJECT, help="Whose files, jobs, models and logs it sees."),
    scope: list[str] = typer.Option(["read", "write"], help=f"Any of {', '.join(SCOPES)}; may be given again."),
    requests_per_minute: int = typer.Option(None, min=0, help=f"How many requests it may make. {USUAL}"),
    tokens_per_minute: int = typer.Option(None, min=0, help=f"How many tokens it may use. {USUAL}"),
    as_json: bool = Json,
) -> None:
    """Make a key and show it, once. From the first one on, the service asks every client for a key."""
    from luthier.errors import InputError
    from luthier.records.access import Rates
    from luthier.workflows.keys import create_key

    known: dict[str, Scope] = {known: known for known in SCOPES}
    if unknown := [one for one in scope if one not in known]:
        raise InputError(f"The scope {unknown[0]!r} is not one of {', '.join(SCOPES)}.")
    rates = Rates(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
    store = open_store()
    is_first = not store.keys.any()
    key, secret = create_key(store, name, project, [known[one] for one in scope], rates)
    if as_json:
        show_json({"key": key, "secret": secret})
        return
    typer.echo(secret)
    typer.echo(
        f"{key.id} for the project {key.project!r} with {', '.join(key.scopes)}. It is not shown again.", err=True
    )
    if is_first:
        typer.echo("It is the first one: from now on every request needs a key.", err=True)


@app.command("list")
def list_keys(as_json: bool = Json) -> None:
    """Show the keys, without their secrets."""
    keys = open_store().keys.all()
    if as_json:
        show_json(keys)
        return
    rows = [
        (
            key.id,
            key.name,
            key.project,
            ", ".join(key.scopes),
            f"…{key.ending}",
            _rate(key.rates.requests_per_minute),
            _rate(key.rates.tokens_per_minute),
            moment(datetime.fromtimestamp(key.created_at, UTC)),
            "revoked" if key.revoked_at else "",
        )
        for key in keys
    ]
    show_table(None, ("key", "name", "project", "scopes", "ends in", "#requests/min", "#tokens/min", "made", ""), rows)


@app.command()
def revoke(key_id: str = typer.Argument(..., help="The key's id, from `luthier key list`.")) -> None:
    """End a key: the next request with it is refused."""
    key = open_store().keys.revoke(key_id)
    typer.echo(f"{key.id} ({key.name}) is revoked.")


def _rate(per_minute: int | None) -> str:
    return "default" if per_minute is None else str(per_minute or "no bound")
