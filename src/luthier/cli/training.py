"""``luthier train``: plan and train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.present import Json, duration, follow_run, open_store, show_json, show_table, size

if TYPE_CHECKING:
    from luthier.records.training import TrainingPlan


def train(
    dataset: str = typer.Argument(None, help="A divided dataset: name, or name@version."),
    template: str = typer.Option(None, "--template", "-t", help="A saved template; none for conversations."),
    base: str = typer.Option("smollm2-135m", "--base", "-b", help="A base model that was pulled."),
    adapter: Path = typer.Option(None, help="A folder with an adapter for the base (PEFT's files) to go on from."),
    suffix: str = typer.Option("", help="Stands in the model's name: letters, digits, . _ -"),
    method: str = typer.Option(
        None, "--method", "-m", help="supervised, raw_text, dpo, orpo, kto, reward, classification or regression."
    ),
    mode: str = typer.Option(None, help="lora, rslora, dora, qlora, full or last_layers."),
    option: list[str] = typer.Option([], "--option", "-o", help="name=value; see --options for all of them."),
    config: Path = typer.Option(None, help="A YAML or JSON file with options."),
    parity_prompts: int = typer.Option(64, help="Held-out prompts that prove that what is served was trained."),
    parity_limit: float = typer.Option(0.97, help="Share of answer tokens that must agree."),
    plan: bool = typer.Option(False, "--plan", help="Only say what would be done, and why."),
    options: bool = typer.Option(False, "--options", help="Only list the options."),
    detach: bool = typer.Option(False, help="Put it into the queue and return."),
    as_json: bool = Json,
) -> None:
    """Train a model: plan, training, export, proof of parity, registration."""
    if options:
        _show_options(as_json)
        return
    if dataset is None:
        raise typer.BadParameter("name a dataset (luthier dataset list)", param_hint="DATASET")
    from luthier.records.model import check_suffix

    if suffix:
        check_suffix(suffix)
    from luthier.jobs.launch import start, submit
    from luthier.records.record import validated
    from luthier.workflows.training import TrainRequest, finished_result
    from luthier.workflows.training import plan as plan_run

    store = open_store()
    request = validated(
        TrainRequest,
        "training run",
        base=base,
        adapter=adapter.absolute() if adapter else None,
        dataset=store.datasets.get(dataset).reference,
        template=store.templates.get(template).reference if template else None,
        suffix=suffix,
        options=_training_config([*_named(method=method, mode=mode), *option], config),
        parity_prompts=parity_prompts,
        parity_limit=parity_limit,
    )
    if plan:
        made = plan_run(store, request)
        show_json(made) if as_json else _show_plan(made)
        return
    if not as_json:
        _show_plan(plan_run(store, request, measure=False))
    run = submit(store, "train", request)
    if detach:
        start(store, run.id)
        show_json(run) if as_json else typer.echo(f"{run.id} is queued. Follow it: luthier run logs {run.id} --follow")
        return
    follow_run(store, run.id, quiet=as_json)
    model = store.models.get(finished_result(store, run.id)["model"])
    if as_json:
        show_json(model)
        return
    from luthier.cli.models import show_parity

    show_parity(model)
    if model.product != "generator":
        rows = [(name.replace("_", " "), f"{value:.4g}") for name, value in model.training.test_metrics.items()]
        show_table("On the test side, best step", ("what", "#value"), rows)
        exporting = f"luthier model export {model.name} --form merged --to my-{model.product}"
        typer.echo(f"\n{model.name}\n\nNext: luthier model show {model.name}\n      {exporting}")
        return
    typer.echo(
        f"\n{model.name}\n\nNext: luthier evaluate {model.name}\n      luthier chat {model.name}\n      luthier serve"
    )


def _training_config(options: list[str], path: Path | None) -> Any:
    """Return the options of a file and of the command line together; the command line wins.

    Raises:
        InputError: with all problems at once.
    """
    import json

    from pydantic import ValidationError

    from luthier.errors import InputError, did_you_mean
    from luthier.records.options import options_of
    from luthier.records.training import TrainingConfig

    values: dict[str, Any] = {}
    problems: list[str] = []
    if path:
        import yaml

        try:
            values = yaml.safe_load(path.read_text("utf-8")) or {}
            if not isinstance(values, dict):
                raise InputError(f"{path} holds no options: it must be name: value, one a line.")
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"The option {text!r} is not name=value.")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        *outer, last = name.split(".")
        inside = values
        for key in outer:
            inside = inside.setdefault(key, {})
            if not isinstance(inside, dict):
                raise InputError(f"The option {name!r} goes into {key!r}, which was given as {inside!r}.")
        inside[last] = read
    known = [option.name for option in options_of(TrainingConfig)]
    try:
        config = TrainingConfig.model_validate(values)
    except ValidationError as error:
        for found in error.errors():
            parts = [str(part) for part in found["loc"]]  # behind the option stands which of its types was tried
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            name = next((prefix for prefix in prefixes if prefix in known), ".".join(parts))
            unknown = found["type"] == "extra_forbidden"
            problem = f"there is no option {name!r}.{did_you_mean(name, known)}" if unknown else found["msg"]
            problems.append(problem if unknown else f"{name} = {found['input']!r}: {problem}")
    if problems:
        raise InputError(
            "The training options are not valid.", problems=sorted(set(problems)), hint="luthier train --options"
        )
    return config


def _show_options(as_json: bool) -> None:
    from luthier.records.options import Option, options_of
    from luthier.records.training import TrainingConfig

    if as_json:
        show_json(TrainingConfig.model_json_schema())
        return
    show_table(None, Option._fields, options_of(TrainingConfig))


def _named(**flags: str | None) -> list[str]:
    return [f"{name}={value}" for name, value in flags.items() if value is not None]


def _show_plan(plan: TrainingPlan) -> None:
    rows = [
        ("examples", f"{plan.examples:,}", f"and {plan.validation_examples:,} for validation"),
        ("tokens a pass", f"{plan.tokens_per_epoch:,}", f"{plan.loss_tokens_per_epoch:,} of them with loss"),
        (
            "computed a pass",
            f"{plan.computed_tokens_per_epoch:,}",
            f"the first {plan.shared_prefix} tokens are shared by all examples and computed once a row",
        ),
        ("steps", f"{plan.steps:,}", f"{plan.resolved.batch_size} examples each"),
        ("memory", size(plan.memory_bytes), f"of {size(plan.machine_memory_bytes)} free; {_how(plan, 'estimated')}"),
        (
            "time",
            f"about {duration(plan.seconds)}",
            f"training and validating, {_how(plan, 'from the measured matrix rate')}",
        ),
    ]
    if plan.main_memory_bytes:
        free = plan.machine_main_memory_bytes or plan.machine_memory_bytes
        why = f"of {size(free)} free; loading, export and parity, the data set with it"
        rows.append(("main memory", size(plan.main_memory_bytes), why))
    rows += [(reason.name, reason.value, reason.reason) for reason in plan.reasons]
    rows += [("left out", f"{count:,}", problem.replace("_", " ")) for problem, count in plan.dropped.items()]
    if plan.truncated:
        rows.append(("truncated", f"{plan.truncated:,}", "longer than max_tokens"))
    show_table("Plan", ("what", "#value", "why"), rows)


def _how(plan: TrainingPlan, otherwise: str) -> str:
    if plan.measured is None:
        return otherwise
    return f"measured: {plan.measured.tokens:,} tokens in {plan.measured.seconds:.1f} s"
