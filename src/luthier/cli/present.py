"""How the command line shows things: tables, records as JSON, bytes and times in words, and a run as it goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, JustifyMethod

    from luthier.records.run import Run, RunEvent
    from luthier.store.store import Store

Json = typer.Option(False, "--json", help="Print JSON instead of tables.")
STYLES = {"warning": "yellow", "error": "red"}


def open_store() -> Store:
    """Open the store of this installation's home."""
    from luthier.settings import load_settings
    from luthier.store.store import Store

    return Store(load_settings().home)


def console(*, stderr: bool = False) -> Console:
    """Return the terminal."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def show_json(value: Any) -> None:
    """Print a record, or a list of records, as JSON."""

    def plain(item: BaseModel) -> Any:
        return item.model_dump(mode="json")

    typer.echo(json.dumps(value, default=plain, indent=2, ensure_ascii=False))


def show_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table.

    Columns whose name begins with ``#`` are aligned to the right; of those whose name ends in ``…`` only one line is
    shown, cut where it is too long. The first column and one called status are never broken.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def cell(column: str, value: object) -> Text:
        text = str(value)
        cut = column.endswith("…")
        return Text(text.partition("\n")[0], no_wrap=True, overflow="ellipsis") if cut else Text(text)

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, column in enumerate(columns):
        justify: JustifyMethod = "right" if column.startswith("#") else "left"
        # What stands first is a name that people copy: it is never broken over lines.
        whole = place == 0 or column == "status"
        table.add_column(column.lstrip("#").rstrip("…"), justify=justify, overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*map(cell, columns, row))
    console().print(table)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Return values with dotted names, those of inner records too; what is not set or empty is left out."""
    found: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        elif value not in (None, "", [], ()):
            listed = isinstance(value, list | tuple)
            found.append((prefix + name, ", ".join(map(str, value)) if listed else value))
    return found


def size(count: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return a number of seconds in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def moment(when: datetime | None) -> str:
    """Return a time in the local zone, to the minute."""
    return when.astimezone().strftime("%Y-%m-%d %H:%M") if when else ""


def follow_run(store: Store, run_id: str, *, quiet: bool = False) -> Run:
    """Show a run as it goes, until it ends or pauses. Ctrl-C asks it to pause, and says how to go on."""
    from luthier.jobs.launch import follow

    with RunView(quiet=quiet) as view, view.pause_on_interrupt(store):
        view.run_id = run_id
        return follow(store, run_id, view.show)


class RunView:
    """Shows a run's events: a progress bar with loss and speed, and what is worth a line."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.run_id: str | None = None
        self._seen = 0
        self._quiet = quiet
        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console(stderr=True),
            disable=quiet,
        )
        self._task = self._progress.add_task("waiting for a process", total=None, note="")

    def __enter__(self) -> RunView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._task, visible=False)
        self._progress.stop()

    @contextmanager
    def pause_on_interrupt(self, store: Store) -> Iterator[None]:
        """Turn Ctrl-C into a pause of the run that is shown, and wait until its state is saved."""
        from luthier.jobs.launch import follow

        try:
            yield
        except KeyboardInterrupt:
            if self.run_id and not store.runs.get(self.run_id).is_finished:
                store.runs.request(self.run_id, "pause")
                self.note("Pausing: saving the state …")
                if follow(store, self.run_id, after=self._seen).status == "paused":
                    self.note(f"Paused. Go on with: luthier run resume {self.run_id}")
            raise

    def note(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        if not self._quiet:
            self._progress.console.print(text, style=style, markup=False)

    def show(self, event: RunEvent) -> None:
        """Show one event."""
        self.run_id, self._seen = event.run_id, event.sequence
        data = event.data
        if event.type == "stage" and "seconds" in data:
            self.note(f"  {data['stage']:<32}{duration(data['seconds']):>12}")
        elif event.type == "stage":
            self._progress.reset(self._task, total=None, description=data["stage"], note="")
        elif event.type == "progress":
            self._progress.update(self._task, completed=data["done"], total=data["total"], note=event.message)
        elif event.type == "metrics":
            loss = "not finite" if data["train_loss"] is None else f"{data['train_loss']:.3f}"
            note = f"loss {loss} · {data['tokens_per_second']:,.0f} tokens/s"
            note += f" · {duration(data['seconds_left'])} left"
            self._progress.update(self._task, completed=data["step"], total=data["steps"], note=note)
            if data.get("valid_loss") is not None:
                self.note(f"    step {data['step']}: validation loss {data['valid_loss']:.3f}")
        else:
            self.note(f"    {event.message}", STYLES.get(event.level))
