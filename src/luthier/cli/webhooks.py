"""``luthier webhook``: who is told when a job, a batch or a run of an evaluation ends."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from luthier.cli.present import Json, moment, open_store, show_json, show_table
from luthier.records.scopes import DEFAULT_PROJECT

if TYPE_CHECKING:
    from luthier.records.webhook import EventType, WebhookEndpoint

app = typer.Typer(no_args_is_help=True, help="Webhooks: who is told when a job, a batch or an evaluation ends.")
Project = typer.Option(DEFAULT_PROJECT, help="Whose runs it is about.")
Endpoint = typer.Argument(..., help="The endpoint's id, from `luthier webhook list`.")
KEEP_OLD = typer.Option(False, "--keep-old", help="Let the old secret sign too for 24 hours.")


@app.command()
def create(
    url: str = typer.Argument(..., help="An http or https address."),
    name: str = typer.Option("webhook", help="What it is for."),
    event: list[str] = typer.Option(
        [], help="Such as fine_tuning.job.succeeded; may be given again; all types where not given."
    ),
    project: str = Project,
    as_json: bool = Json,
) -> None:
    """Make an endpoint and show its secret, once: what OPENAI_WEBHOOK_SECRET is to be where it is received."""
    from luthier.workflows.webhooks import create_endpoint

    endpoint, secret = create_endpoint(open_store(), project, name, url, _types(event))
    if as_json:
        show_json({"endpoint": endpoint, "secret": secret})
        return
    typer.echo(secret)
    typer.echo(f"{endpoint.id} tells {endpoint.url}. The secret is not shown again.", err=True)


@app.command("list")
def list_all(project: str = Project, as_json: bool = Json) -> None:
    """Show a project's endpoints, without their secrets."""
    endpoints = list(open_store().outbox.endpoints.all(project))
    if as_json:
        show_json(endpoints)
        return
    rows = [(one.id, f"{one.name}\n{one.url}", _events(one), one.disabled or "") for one in endpoints]
    show_table(None, ("endpoint", "name, address", "events", "disabled"), rows)


@app.command()
def deliveries(
    endpoint: str = Endpoint,
    limit: int = typer.Option(20, min=1, max=1000, help="How many, the newest first."),
    project: str = Project,
    as_json: bool = Json,
) -> None:
    """Show what an endpoint was told, and what it is still to be told."""
    from luthier.workflows.webhooks import list_deliveries

    page = list_deliveries(open_store(), project, endpoint, limit=limit)
    if as_json:
        show_json(list(page.items))
        return
    rows = [
        (
            one.type,
            one.subject,
            one.status,
            one.attempts,
            one.error or one.status_code or "",
            _moment(one.next_attempt_at) if one.status == "pending" else "",
        )
        for one in page.items
    ]
    show_table(None, ("event", "of", "status", "#attempts", "answer", "next attempt"), rows)


@app.command("test")
def pretend(
    endpoint: str = Endpoint,
    event: str = typer.Option("fine_tuning.job.succeeded", help="The type of event to pretend."),
    project: str = Project,
) -> None:
    """Tell an endpoint of something that did not happen, and show what it answered."""
    import asyncio

    from luthier.errors import EngineError
    from luthier.serve.webhooks import Attempt, Sender
    from luthier.settings import load_settings
    from luthier.workflows.deliveries import send_test
    from luthier.workflows.webhooks import get_endpoint

    (type_,) = _types([event])
    store = open_store()
    known = get_endpoint(store, project, endpoint)

    async def tell() -> Attempt:
        sender = Sender(load_settings().webhook_targets)
        try:
            return await send_test(store, sender, known, type_)
        finally:
            await sender.close()

    attempt = asyncio.run(tell())
    if not attempt.succeeded:
        raise EngineError(f"{known.url} did not take it: {attempt.error or f'status {attempt.status_code}'}.")
    typer.echo(f"{known.url} answered {attempt.status_code}.")


@app.command("rotate-secret")
def rotate(endpoint: str = Endpoint, keep_old: bool = KEEP_OLD, project: str = Project) -> None:
    """Give an endpoint a new secret and show it, once."""
    from luthier.workflows.webhooks import rotate_secret

    typer.echo(rotate_secret(open_store(), project, endpoint, keep_old_for_24_hours=keep_old)[1])


@app.command()
def delete(endpoint: str = Endpoint, project: str = Project) -> None:
    """Delete an endpoint, and what it was still to be told."""
    from luthier.workflows.webhooks import delete_endpoint

    gone = delete_endpoint(open_store(), project, endpoint)
    typer.echo(f"{gone.id} ({gone.name}) is deleted.")


def _events(endpoint: WebhookEndpoint) -> str:
    from luthier.records.webhook import EVENT_TYPES

    return "all" if set(endpoint.event_types) == set(EVENT_TYPES) else "\n".join(endpoint.event_types)


def _types(texts: list[str]) -> list[EventType]:
    from luthier.errors import InputError, did_you_mean
    from luthier.records.webhook import EVENT_TYPES

    known: dict[str, EventType] = {known: known for known in EVENT_TYPES}
    if unknown := [text for text in texts if text not in known]:
        raise InputError(f"There is no event type {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
    return [known[text] for text in texts] or list(EVENT_TYPES)


def _moment(seconds: int) -> str:
    return moment(datetime.fromtimestamp(seconds, UTC))
