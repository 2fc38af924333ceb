"""Runs of evals as OpenAI's clients handle them: create, find, cancel, delete, and read what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.errors import ConflictError, InputError, NotFoundError
from luthier.evaluate.graders.template import check_template
from luthier.records.eval import (
    Eval,
    EvalRun,
    EvalRunStatus,
    FileContent,
    FileId,
    InputMessages,
    ItemReference,
    ItemStatus,
    LoggedCompletions,
    LoggedData,
    LoggedResponses,
    OutputItem,
    RowSource,
    RunPlan,
    RunSource,
    TemplateMessages,
)
from luthier.records.run import Run, RunStatus
from luthier.records.stored import Metadata, Page, new_id, now
from luthier.store.collection import BLOCK, Order
from luthier.store.store import Store
from luthier.workflows.eval_rows import problems_of
from luthier.workflows.eval_sampling import NO_ERROR
from luthier.workflows.evals import data_of, remove_run, schema_of
from luthier.workflows.files import file_for
from luthier.workflows.written import read_written, refused

Json = dict[str, Any]
PLACE = ("data_source",)
SOURCES: dict[str, type[RunSource]] = {"jsonl": RunSource, "completions": RunSource, "responses": RunSource}
ROW_SOURCES: dict[str, dict[str, type[RowSource]]] = {
    "jsonl": {"file_content": FileContent, "file_id": FileId},
    "completions": {"file_content": FileContent, "file_id": FileId, "stored_completions": LoggedCompletions},
    "responses": {"file_content": FileContent, "file_id": FileId, "responses": LoggedResponses},
}
MESSAGES: dict[str, type[InputMessages]] = {"template": TemplateMessages, "item_reference": ItemReference}
UNHEARD = {  # what the route that is asked does not take
    "jsonl": {},
    "completions": {"text": "/v1/chat/completions has no such field; give response_format"},
    "responses": {
        "seed": "/v1/responses has no such field",
        "response_format": "/v1/responses has no such field; give text",
    },
}
PLAN_FILE = "plan.json"
STATUSES: dict[RunStatus, EvalRunStatus] = {
    "queued": "queued",
    "running": "in_progress",
    "paused": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "canceled",
}


def create_run(
    store: Store,
    project: str,
    eval_id: str,
    name: str | None,
    data_source: Json,
    metadata: Metadata | None,
    check_model: Callable[[str], object],
) -> EvalRun:
    """Put a run of an eval into the queue. ``check_model`` raises where the project can ask no model of a name.

    Raises:
        NotFoundError: the project has no such eval.
        ApiError: 404 where its file or its model is not there, 400 where a field breaks its rule; each names the field.
    """
    eval = store.evals.evals.get(project, eval_id)
    source = _checked(store, project, eval, data_source)
    if source.model is not None:
        _check_model(check_model, source.model)
    data = data_of(eval)
    id = new_id("evalrun_")
    plan = RunPlan(
        data_source=data_source,
        item_schema=None if isinstance(data, LoggedData) else data.item_schema,
        logged_metadata=data.metadata if isinstance(data, LoggedData) else None,
        criteria=eval.testing_criteria,
    )
    (store.run_folder(id) / PLAN_FILE).write_text(plan.model_dump_json(), "utf-8")
    run = EvalRun(
        id=id,
        project=project,
        created_at=now(),
        metadata=metadata,
        parent=eval.id,
        name=name or id,
        model=source.model or "",
    )
    store.evals.runs.add(run)
    store.runs.add(id, "eval_run", {"eval_id": eval.id, "name": run.name}, project=project, metadata=metadata)
    return run


def find_run(store: Store, project: str, eval_id: str, id: str) -> EvalRun:
    """Return a run of a project's eval.

    Raises:
        NotFoundError: the project has no such eval, or the eval no such run.
    """
    store.evals.evals.get(project, eval_id)
    run = store.evals.runs.get(project, id)
    if run.parent != eval_id:
        raise NotFoundError(f"The eval {eval_id!r} has no run {id!r}.")
    store.runs.get(id, project=project)  # one that was never put into the queue was never acknowledged
    return run


def list_runs(
    store: Store,
    project: str,
    eval_id: str,
    *,
    after: str | None = None,
    limit: int = 20,
    order: Order = "asc",
    status: EvalRunStatus | None = None,
) -> Page[EvalRun]:
    """Return a part of an eval's runs.

    Raises:
        NotFoundError: the project has no such eval, or the eval no run ``after``.
    """
    store.evals.evals.get(project, eval_id)
    found: list[EvalRun] = []
    for run in _runs(store, project, eval_id, after, order):
        with suppress(NotFoundError):
            if status is None or status == status_of(store.runs.get(run.id, project=project)):
                found.append(run)
        if len(found) > limit:
            break
    return Page(items=tuple(found[:limit]), has_more=len(found) > limit)


def cancel_run(store: Store, project: str, eval_id: str, id: str) -> EvalRun:
    """Ask a run to end; what it has evaluated stays.

    Raises:
        NotFoundError: there is no such run.
        ConflictError: it has ended.
    """
    run = find_run(store, project, eval_id, id)
    queued = store.runs.get(id, project=project)
    if queued.is_finished:
        raise ConflictError(f"The run {id} has ended already: it is {status_of(queued)}.")
    store.runs.request(id, "cancel")
    return run


def delete_run(store: Store, project: str, eval_id: str, id: str) -> None:
    """Delete a run with its items; one that has not ended is cancelled.

    Raises:
        NotFoundError: there is no such run.
    """
    find_run(store, project, eval_id, id)
    remove_run(store, project, id)


def list_items(
    store: Store,
    project: str,
    eval_id: str,
    run_id: str,
    *,
    after: str | None = None,
    limit: int = 20,
    order: Order = "asc",
    status: ItemStatus | None = None,
) -> Page[OutputItem]:
    """Return a part of a run's items, in the order in which they were evaluated.

    Raises:
        NotFoundError: there is no such run, or no item ``after``.
    """
    find_run(store, project, eval_id, run_id)
    return store.evals.items.page(project, after=after, limit=limit, order=order, parent=run_id, status=status)


def find_item(store: Store, project: str, eval_id: str, run_id: str, id: str) -> OutputItem:
    """Return an item of a run.

    Raises:
        NotFoundError: there is no such run, or it has no such item.
    """
    find_run(store, project, eval_id, run_id)
    item = store.evals.items.get(project, id)
    if item.parent != run_id:
        raise NotFoundError(f"The run {run_id!r} has no output item {id!r}.")
    return item


def read_plan(folder: Path) -> RunPlan:
    """Return what a run is to do, by its folder."""
    return RunPlan.model_validate_json((folder / PLAN_FILE).read_bytes())


def status_of(run: Run) -> EvalRunStatus:
    """Return OpenAI's word; a paused run is one that is in progress."""
    return STATUSES[run.status]


def run_object(store: Store, run: EvalRun, address: str) -> Json:
    """Return a run as ``eval.run``. ``address`` is the service's, as its client knows it."""
    queued = store.runs.get(run.id, project=run.project)
    tally = run.tally
    counts = {"passed": tally.passed, "failed": tally.failed, "errored": tally.errored}
    return {
        "id": run.id,
        "object": "eval.run",
        "eval_id": run.parent,
        "name": run.name,
        "status": status_of(queued),
        "model": run.model,
        "created_at": run.created_at,
        "report_url": f"{address}v1/evals/{run.parent}/runs/{run.id}/output_items",
        "result_counts": {"total": sum(counts.values()), **counts},
        "per_model_usage": [{"model_name": name, **used.model_dump()} for name, used in tally.models.items()],
        "per_testing_criteria_results": [
            {"testing_criteria": name, **results.model_dump()} for name, results in tally.criteria.items()
        ],
        "data_source": read_plan(store.run_folder(run.id)).data_source,
        "error": {"code": "run_failed", "message": queued.error} if queued.error else NO_ERROR,
        "metadata": run.metadata or {},
    }


def item_object(item: OutputItem) -> Json:
    """Return an item as ``eval.run.output_item``."""
    return {
        "id": item.id,
        "object": "eval.run.output_item",
        "run_id": item.parent,
        "eval_id": item.eval_id,
        "created_at": item.created_at,
        "status": item.status,
        "datasource_item_id": item.number,
        "datasource_item": item.item,
        "results": list(item.results),
        "sample": item.sample,
    }


def row_source(data_source: Json) -> RowSource:
    """Return where the rows of a run come from.

    Raises:
        ApiError: 400; it names the field.
    """
    return read_written(ROW_SOURCES[data_source["type"]], data_source["source"], (*PLACE, "source"))


def input_messages(data_source: Json) -> InputMessages | None:
    """Return what a model is asked in a run; None where none is.

    Raises:
        ApiError: 400; it names the field.
    """
    written = data_source.get("input_messages")
    if written is None:
        return None
    messages = read_written(MESSAGES, written, (*PLACE, "input_messages"))
    if isinstance(messages, TemplateMessages):
        for number, message in enumerate(messages.template):
            place = (*PLACE, "input_messages", "template", number, "content")
            try:
                check_template(message.text, "content", ("item",))
            except InputError as error:
                raise refused(place, str(error)) from error
    return messages


def _checked(store: Store, project: str, eval: Eval, data_source: Json) -> RunSource:
    source = read_written(SOURCES, data_source, PLACE)
    rows = row_source(data_source)
    messages = input_messages(data_source)
    if source.type != "jsonl":
        logged = isinstance(rows, LoggedCompletions | LoggedResponses)
        if source.model is None and (messages is not None or not logged):
            raise refused((*PLACE, "model"), "Field required", kind="missing")
        if source.model is not None and messages is None and not logged:
            raise refused((*PLACE, "input_messages"), "Field required", kind="missing")
    for name, why in UNHEARD[source.type].items():
        if getattr(source.sampling_params, name, None) is not None:
            raise refused((*PLACE, "sampling_params", name), why)
    if isinstance(rows, FileId):
        _check_file(store, project, rows)
    if isinstance(rows, FileContent):
        _check_rows(eval, rows)
    return source


def _check_model(check: Callable[[str], object], name: str) -> None:
    try:
        check(name)
    except NotFoundError as error:
        raise refused((*PLACE, "model"), str(error), status=404, code="model_not_found") from error
    except InputError as error:
        raise refused((*PLACE, "model"), str(error)) from error


def _check_file(store: Store, project: str, source: FileId) -> None:
    param = ".".join((*PLACE, "source", "id"))
    file = file_for(store, project, source.id, "evals", param)
    if file.status == "error":
        raise refused((*PLACE, "source", "id"), f"the file cannot be used. {file.status_details or ''}".strip())


def _check_rows(eval: Eval, source: FileContent) -> None:
    schema = schema_of(data_of(eval), ("item_schema",))
    for number, row in enumerate(source.content):
        place = (*PLACE, "source", "content", number)
        try:
            problems = problems_of(row.model_dump(), schema)
        except InputError as error:
            raise refused(place, str(error)) from error
        if problems:
            raise refused(place, "; ".join(problems))


def _runs(store: Store, project: str, eval_id: str, after: str | None, order: Order) -> Iterator[EvalRun]:
    more = True
    while more:
        page = store.evals.runs.page(project, after=after, limit=BLOCK, order=order, parent=eval_id)
        yield from page.items
        more, after = page.has_more, page.items[-1].id if page.items else None
