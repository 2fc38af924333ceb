"""``luthier up``, ``luthier serve`` and ``luthier chat``."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from luthier.cli.present import open_store

HOST = typer.Option("127.0.0.1", help="Where to listen; other addresses than the loopback need a key.")
PORT = typer.Option(8000, min=0, max=65535, help="0 takes a free one.")
API_KEY = typer.Option(None, envvar="LUTHIER_API_KEY", help="One more key beside those of `luthier key`.")
ANNOUNCE = typer.Option(
    False, help="For programs: print the address as a JSON line once it is ready, end when standard input ends."
)


class LogFormat(StrEnum):
    """How a log is written."""

    text = "text"
    json = "json"


class LogLevel(StrEnum):
    """What is worth a line."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


LOG_FORMAT = typer.Option(LogFormat.text, envvar="LUTHIER_LOG_FORMAT", help="How the log is written.")
LOG_LEVEL = typer.Option(
    None,
    envvar="LUTHIER_LOG_LEVEL",
    help="What is worth a line on standard error: info has one for every request. Warnings alone with --announce.",
)
LOG_PROMPTS = typer.Option(
    False, "--log-prompts", envvar="LUTHIER_LOG_PROMPTS", help="Write what models are asked into the log, too."
)
GRACE = typer.Option(10, min=0, envvar="LUTHIER_GRACE_SECONDS", help="Seconds for requests under way at the end.")
log = logging.getLogger("luthier.api")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def up(
    host: str = HOST,
    port: int = PORT,
    api_key: str = API_KEY,
    workers: int = typer.Option(1, min=1, help="How many runs (training, evaluation) are executed at once."),
    batches: int = typer.Option(4, min=1, help="How many batches and runs of evals are executed at once."),
    announce: bool = ANNOUNCE,
    grace: int = GRACE,
    log_format: LogFormat = LOG_FORMAT,
    log_level: LogLevel = LOG_LEVEL,
    log_prompts: bool = LOG_PROMPTS,
) -> None:
    """Start the whole service on one port: OpenAI's API, all models, and the runs that wait in the queue.

    Ctrl-C or SIGTERM ends it: requests under way get some seconds, runs go back into the queue at their next step.
    """
    _write_logs(log_format, log_level, announce=announce)
    options = {"processes": workers, "resident_runs": batches, "log_prompts": log_prompts}
    _serve(host, port, api_key, announce=announce, grace=grace, options=options)


def serve(
    host: str = HOST,
    port: int = PORT,
    api_key: str = API_KEY,
    extra: list[str] = typer.Option([], help="A further model: NAME=FOLDER with model.gguf and its chat format."),
    only_extra: bool = typer.Option(False, help="Serve the --extra models alone."),
    announce: bool = ANNOUNCE,
    grace: int = GRACE,
    log_format: LogFormat = LOG_FORMAT,
    log_level: LogLevel = LOG_LEVEL,
    log_prompts: bool = LOG_PROMPTS,
) -> None:
    """Serve models only: like `luthier up`, but the queue of runs is left to others."""
    _write_logs(log_format, log_level, announce=announce)
    folders = _extra_folders(extra)
    options = {"log_prompts": log_prompts}
    _serve(host, port, api_key, announce=announce, grace=grace, options=options, folders=folders, only_extra=only_extra)


def _extra_folders(texts: list[str]) -> dict[str, Path]:
    from luthier.errors import InputError

    folders: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not (name and folder) or name in folders:
            rule = "--extra takes NAME=FOLDER, each name once"
            raise InputError(f"{rule}; not {text!r}.", hint="for example --extra mine=exports/mine")
        folders[name] = Path(folder)
    return folders


def _serve(
    host: str,
    port: int,
    api_key: str | None,
    *,
    announce: bool,
    grace: int,
    options: Mapping[str, Any],
    folders: Mapping[str, Path] | None = None,
    only_extra: bool = False,
) -> None:
    from luthier.api.app import create_app
    from luthier.api.server import serve as run_server
    from luthier.api.service import Service
    from luthier.errors import InputError
    from luthier.records.access import Rates
    from luthier.settings import load_settings
    from luthier.workflows.serving import missing_stand_ins, model_pool

    store = open_store()
    needs_key = api_key is not None or store.keys.any()
    if host not in LOOPBACK and not needs_key:
        raise InputError(
            f"Listening on {host} lets other machines in, and there is no key.",
            hint="luthier key create NAME, or set LUTHIER_API_KEY",
        )
    settings = load_settings()
    for line in () if only_extra else missing_stand_ins(store, settings.stand_ins):
        log.warning(line)
    pool = model_pool(store, folders, only_extra=only_extra, stand_ins=settings.stand_ins, settings=settings)

    def ready(url: str) -> None:
        if announce:
            typer.echo(json.dumps({"url": url}))
            return
        typer.echo(f"Serving on {url}/v1 (stop with Ctrl-C)")
        models = pool.models()
        for model in models:
            typer.echo(f"  {model.name}")
        if not models:
            typer.echo("  There is no model yet: luthier model pull smollm2-135m")
        key = "one of `luthier key list`" if needs_key else "none"
        typer.echo(f'\nfrom openai import OpenAI\nclient = OpenAI(base_url="{url}/v1", api_key="{key}")')

    if announce:
        threading.Thread(target=_end_with_standard_input, daemon=True).start()
    rates = Rates(requests_per_minute=settings.requests_per_minute, tokens_per_minute=settings.tokens_per_minute)
    service = Service(store, pool, api_key, rates=rates, webhook_targets=settings.webhook_targets, **options)
    run_server(create_app(service), host, port, ready, grace)


def _write_logs(format: LogFormat, level: LogLevel | None, *, announce: bool) -> None:
    from luthier.api.logs import configure_logs

    configure_logs(format, level or (LogLevel.warning if announce else LogLevel.info))


def _end_with_standard_input() -> None:
    while os.read(sys.stdin.fileno(), 2**12):  # a buffered reader's lock would still be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def chat(
    model: str = typer.Argument(..., help="A tuned model, or a base model that was pulled."),
    system: str = typer.Option(None, help="The system prompt; a tuned model's own where not given."),
    temperature: float = typer.Option(0.0, help="0 always gives the likeliest answer; higher ones vary."),
    max_tokens: int = typer.Option(256, help="The longest answer."),
    alone: bool = typer.Option(False, "--single", help="Each line is a conversation of its own."),
) -> None:
    """Talk to a model in the terminal. An empty line or Ctrl-D ends it."""
    from luthier.llm.local import LocalModel
    from luthier.records.completion import Sampling
    from luthier.records.example import Message
    from luthier.records.record import validated
    from luthier.workflows.models import served_folder

    sampling = validated(Sampling, "sampling", max_tokens=max_tokens, temperature=temperature)
    store = open_store()
    name = model if model in {base.id for base in store.models.bases()} else store.models.get(model).name
    if system is None and name.startswith("ft:"):
        template = store.models.get(name).template
        system = template.template.system if template and template.template.fixed_system else None
    opening = [Message(role="system", content=system)] if system else []
    history = list(opening)
    typer.echo(f"{name}" + (f"\nsystem: {system}" if system else ""), err=True)
    engine = LocalModel(served_folder(store, name), name)
    try:
        while (line := _ask()) is not None:
            history = [*(opening if alone else history), Message(role="user", content=line)]
            answer = ""
            for piece in engine.stream(history, sampling):
                typer.echo(piece, nl=False)
                answer += piece
            typer.echo()
            history.append(Message(role="assistant", content=answer))
    finally:
        engine.close()


def _ask() -> str | None:
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return line or None
