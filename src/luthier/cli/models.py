"""``luthier model``: fetch base models, look at tuned ones, export them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from luthier.cli.present import Json, console, flat, moment, open_store, show_json, show_table, size
from luthier.records.scopes import DEFAULT_PROJECT

if TYPE_CHECKING:
    from luthier.records.base_model import BaseModelInfo
    from luthier.records.dataset import DatasetKind
    from luthier.records.model import TunedModel
    from luthier.records.training import Resolved

app = typer.Typer(no_args_is_help=True, help="Base models and tuned models.")
ENCODER_USE = "For classification and embeddings (/v1/embeddings); it does not write, so it does not chat."


@app.command()
def pull(
    name: str = typer.Argument("smollm2-135m", help="A catalogue name, a hub id (owner/model), or a local folder."),
    as_json: bool = Json,
) -> None:
    """Fetch a base model, check it, convert it once, and cache it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from luthier.workflows.models import pull as pull_model

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task("Looking", total=None)

        def bytes_done(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        def stage(text: str) -> None:
            progress.update(task, description=text, completed=0, total=None)

        info = pull_model(open_store(), name, bytes_done, stage)
        progress.update(task, visible=False)
    if as_json:
        show_json(info)
        return
    sizes = f"{info.parameters / 1e6:,.0f} million parameters, context {info.context_length:,} tokens"
    typer.echo(f"{info.id}: {info.kind}, {sizes}." + (" " + ENCODER_USE if info.kind == "encoder" else ""))
    _warn(info.id, info.licence, info.restriction)


@app.command()
def catalogue(as_json: bool = Json) -> None:
    """Show the base models that are known by a short name."""
    from luthier.workflows.models import catalogue as known

    entries = known()
    if as_json:
        show_json(entries)
        return
    rows = [
        (
            e.id,
            e.kind,
            f"{e.parameters / 1e6:,.0f} M",
            f"{e.context_length:,}",
            e.chat_format,
            e.licence,
            e.restriction or e.note,
        )
        for e in entries
    ]
    show_table(None, ("name", "kind", "#parameters", "#context", "chat format", "licence", "note"), rows)
    typer.echo("Any hub id (owner/model) with safetensors weights, or a local folder, works the same way.")


@app.command("list")
def list_models(as_json: bool = Json) -> None:
    """Show the base models that are here, and all tuned models."""
    store = open_store()
    bases, tuned = store.models.bases(), store.models.all()
    if as_json:
        show_json({"bases": bases, "tuned": tuned})
        return
    show_table(
        "Base models",
        ("name", "kind", "#parameters", "#context", "licence"),
        [(b.id, b.kind, f"{b.parameters / 1e6:,.0f} M", f"{b.context_length:,}", b.licence) for b in bases],
    )
    show_table(
        "Tuned models",
        ("name", "dataset", "#loss", "#parity", "made"),
        [
            (
                m.name,
                m.dataset,
                f"{m.training.best_valid_loss:.3f}" if m.training.best_valid_loss is not None else "",
                f"{m.parity.forms[-1].token_agreement:.1%}" if m.parity else "-",
                moment(m.created_at),
            )
            for m in tuned
        ],
    )


@app.command()
def show(name: str, as_json: bool = Json) -> None:
    """Show everything that is recorded of a tuned model, or of a base model."""
    store = open_store()
    base = next((base for base in store.models.bases() if base.id == name), None)
    if base is not None:
        _show_base(base, as_json=as_json)
    else:
        model = store.models.get(name)
        _show_tuned(model, store.datasets.get(model.dataset).kind, as_json=as_json)


def _show_base(base: BaseModelInfo, *, as_json: bool) -> None:
    if as_json:
        show_json(base)
        return
    rows: list[tuple[str, object]] = [
        ("kind", base.kind),
        ("architecture", base.architecture),
        ("parameters", f"{base.parameters:,}"),
        ("context", f"{base.context_length:,} tokens"),
        ("chat format", base.chat_format),
        ("source", base.source),
        ("weights", f"sha256 {base.sha256[:12]}…"),
        ("pulled", moment(base.pulled_at)),
    ]
    show_table(base.id, ("what", "value"), rows)
    _warn(base.id, base.licence, base.restriction)


def _show_tuned(model: TunedModel, kind: DatasetKind, *, as_json: bool) -> None:
    if as_json:
        show_json(model)
        return
    if model.template:
        template = model.template.reference
    else:
        template = "none: the dataset holds " + ("conversations" if kind == "chat" else "fields")
    rows: list[tuple[str, object]] = [
        ("base", f"{model.base} (sha256 {model.base_sha256[:12]}…, {model.licence})"),
        ("dataset", f"{model.dataset} (sha256 {model.dataset_hash[:12]}…)"),
        ("template", template),
        ("run", model.run_id),
        ("code", model.code_version),
        ("made", moment(model.created_at)),
    ]
    rows += _hyperparameters(model.hyperparameters)
    rows += flat(model.training.model_dump(exclude={"valid_metrics", "test_metrics"}))
    for side, metrics in (("validation", model.training.valid_metrics), ("test", model.training.test_metrics)):
        rows += [(f"{side} {name.replace('_', ' ')}", f"{value:.4g}") for name, value in metrics.items()]
    show_table(model.name, ("what", "value"), rows)
    if model.parity:
        show_parity(model)
    forms = [
        (a.kind, size(a.bytes), ", ".join(f"{n} {h[:12]}…" for n, h in a.sha256.items()))
        for a in model.artifacts.values()
    ]
    show_table("Artifacts", ("form", "#size", "files (sha256)"), forms)


def _hyperparameters(resolved: Resolved) -> list[tuple[str, object]]:
    """Return what a model was trained with, without what has no effect on it."""
    from luthier.records.training import has_effect

    values = resolved.model_dump(exclude_defaults=True)
    return flat({name: one for name, one in values.items() if has_effect(name, resolved.method, resolved.mode)})


@app.command()
def export(
    name: str,
    form: str = typer.Option(
        "gguf-f16", "--form", help="adapter, merged, gguf-q8_0 or gguf-f16; merged for models that label or score."
    ),
    to: Path = typer.Option(..., "--to", help="A new or empty folder."),
) -> None:
    """Copy one form of a tuned model to a folder: for PEFT, transformers, llama.cpp, Ollama, LM Studio, OpenVINO."""
    from luthier.errors import InputError, did_you_mean
    from luthier.workflows.models import EXPORT_FORMATS
    from luthier.workflows.models import export as export_model

    if form not in EXPORT_FORMATS:
        raise InputError(f"There is no form {form!r}.{did_you_mean(form, EXPORT_FORMATS)}")
    artifact = export_model(open_store(), name, form, to)
    typer.echo(f"{artifact.kind}: {size(artifact.bytes)} in {to}")


@app.command()
def delete(
    name: str = typer.Argument(..., help="A tuned model."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask first."),
    as_json: bool = Json,
) -> None:
    """Delete a tuned model with all its forms, checkpoints and aliases; log, dataset and evaluations stay."""
    from luthier.errors import InputError
    from luthier.workflows.models import delete_model, model_bytes

    store = open_store()
    if name in {base.id for base in store.models.bases()}:
        raise InputError(f"{name!r} is a base model; only tuned models are deleted.", hint="luthier model list")
    model = store.models.get(name)
    freed = model_bytes(store, model)
    aliases = [one.name for one in store.models.aliases(model.project) if one.model == model.name]
    if not yes:
        also = f" and the aliases {', '.join(aliases)}" if aliases else ""
        typer.confirm(f"Delete {model.name}{also}? That frees {size(freed)}.", abort=True, err=True)
    delete_model(store, model.project, model.name)
    if as_json:
        show_json({"deleted": model.name, "aliases": aliases, "freed_bytes": freed})
        return
    typer.echo(f"{model.name} is deleted; {size(freed)} are free.")


@app.command()
def alias(
    name: str = typer.Argument(None, help="The alias, such as support@production; without it, all are shown."),
    model: str = typer.Argument(None, help="What it points at from now on: a tuned model, or a base."),
    project: str = typer.Option(DEFAULT_PROJECT, help="Whose alias it is."),
    remove: bool = typer.Option(False, "--remove", help="Delete the alias; its model stays."),
    as_json: bool = Json,
) -> None:
    """Point an alias at a model, or show the aliases. Clients ask for an alias as for any model."""
    from luthier.errors import InputError
    from luthier.workflows.models import set_alias

    store = open_store()
    if remove and name and model is None:
        store.models.remove_alias(project, name)
    elif name and model and not remove:
        set_alias(store, project, name, model)
    elif name or model:
        raise InputError("An alias needs a name and the model that it points at.", hint="luthier model alias --help")
    aliases = store.models.aliases(project)
    if as_json:
        show_json(aliases)
        return
    show_table(None, ("alias", "model"), [(one.name, one.model) for one in aliases])


def show_parity(model: object) -> None:
    """Print the table of a model's parity."""
    from luthier.records.model import TunedModel

    if not isinstance(model, TunedModel) or model.parity is None:
        return
    rows = [
        (
            f"{form.form} against adapter",
            f"{form.token_agreement:.1%}",
            f"{form.identical_answers:.1%}",
            "" if form.mean_logprob_difference is None else f"{form.mean_logprob_difference:.4f}",
        )
        for form in model.parity.forms
    ]
    title = f"Parity on {model.parity.prompts} held-out prompts ({model.parity.answer_tokens} answer tokens)"
    show_table(title, ("form", "#tokens agree", "#answers equal", "#log-probability difference"), rows)


def _warn(name: str, licence: str, restriction: str | None) -> None:
    if restriction:
        typer.secho(f"Licence of {name}: {restriction}", fg="yellow")
    else:
        typer.echo(f"Licence: {licence} (commercial use is free)")
