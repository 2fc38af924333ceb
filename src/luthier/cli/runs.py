"""``luthier run``: what is in the queue, what it says, and how to stop it and go on."""

from __future__ import annotations

from typing import Any

import typer

from luthier.cli.present import Json, duration, flat, follow_run, moment, open_store, show_json, show_table

app = typer.Typer(no_args_is_help=True, help="Runs: training and evaluation in the queue.")


@app.command("list")
def list_runs(limit: int = typer.Option(20, help="How many."), as_json: bool = Json) -> None:
    """Show runs, the newest first."""
    runs = open_store().runs.all(limit=limit)
    if as_json:
        show_json(runs)
        return
    rows = [(run.id, run.status, run.attempts, moment(run.created_at), run.error or "") for run in runs]
    show_table(None, ("run", "status", "#attempts", "made", "error…"), rows)


@app.command()
def show(run_id: str, as_json: bool = Json) -> None:
    """Show a run: its status, what was chosen for it, its stages and its last numbers."""
    from luthier.records.training import TrainingConfig

    store = open_store()
    run = store.runs.get(run_id)
    events = store.runs.events(run_id)
    if as_json:
        show_json({"run": run, "events": events})
        return
    rows: list[tuple[str, object]] = [
        ("status", run.status),
        ("attempts", run.attempts),
        ("made", moment(run.created_at)),
    ]
    usual = flat({"options": TrainingConfig().model_dump(mode="json")})
    rows += [chosen for chosen in flat(_with_effect(run.config)) if chosen not in usual]
    rows += [
        (f"stage {e.data['stage']}", duration(e.data["seconds"]))
        for e in events
        if "seconds" in e.data and e.type == "stage"
    ]
    metrics = [event.message for event in events if event.type == "metrics"]
    rows += [("last", metrics[-1])] if metrics else []
    rows += [("error", run.error)] if run.error else []
    show_table(run.id, ("what", "value"), rows)


def _with_effect(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without the options that are for other methods and modes of training."""
    from luthier.records.training import has_effect

    options = config.get("options")
    if not isinstance(options, dict) or not {"method", "mode"} <= options.keys():
        return config
    method, mode = options["method"], options["mode"]
    return config | {"options": {name: one for name, one in options.items() if has_effect(name, method, mode)}}


@app.command()
def logs(
    run_id: str,
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on until it ends."),
    output: bool = typer.Option(False, help="Show what its processes printed instead of its events."),
    as_json: bool = Json,
) -> None:
    """Show what a run said."""
    from luthier.jobs.launch import log_path

    store = open_store()
    store.runs.get(run_id)
    if follow:
        follow_run(store, run_id)
        return
    if output:
        path = log_path(store, run_id)
        typer.echo(path.read_text("utf-8", errors="replace") if path.is_file() else "")
        return
    events = store.runs.events(run_id)
    if as_json:
        show_json(events)
        return
    for event in events:
        color = {"warning": "yellow", "error": "red"}.get(event.level)
        typer.secho(f"{event.created_at.astimezone():%H:%M:%S} {event.message}", fg=color)


@app.command()
def cancel(run_id: str) -> None:
    """Stop a run for good, at its next safe point; what it saved stays."""
    run = open_store().runs.request(run_id, "cancel")
    done = {"cancelled": "cancelled", "queued": "asked to stop; `luthier up` makes the files of what it has"}
    typer.echo(f"{run_id}: {done.get(run.status, 'asked to stop')}")


@app.command()
def pause(run_id: str) -> None:
    """Stop a run at its next safe point, to go on later."""
    run = open_store().runs.request(run_id, "pause")
    typer.echo(f"{run_id}: {'paused' if run.status == 'paused' else 'asked to pause'}")


@app.command()
def resume(run_id: str, as_json: bool = Json) -> None:
    """Go on with a run that was paused, killed or failed, from its last checkpoint; a cancelled one is over."""
    from luthier.jobs.worker import WORKFLOWS

    store = open_store()
    queued = store.runs.requeue(run_id)
    if queued.kind not in WORKFLOWS:
        typer.echo(f"{run_id} is back in the queue; `luthier up` goes on with it.")
        return
    run = follow_run(store, run_id, quiet=as_json)
    if as_json:
        show_json(run)
    else:
        typer.echo(f"{run_id}: {run.status}" + (f" ({run.error})" if run.error else ""))
    raise typer.Exit(0 if run.status == "succeeded" else 1)


def worker() -> None:
    """Take runs from the queue and execute them, one after the other, until stopped."""
    import subprocess
    import sys

    from luthier.settings import load_settings

    home = load_settings().home
    typer.echo(f"Working on the queue of {home}. Stop with Ctrl-C.", err=True)
    try:
        subprocess.run([sys.executable, "-m", "luthier.jobs.worker", "--home", str(home)], check=False)
    except KeyboardInterrupt:
        typer.echo("Stopped; what ran goes on when a worker starts again.", err=True)
