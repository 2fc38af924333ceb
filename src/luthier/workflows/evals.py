"""Evals as OpenAI's clients handle them: create, find, change, delete."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from luthier.errors import ConflictError, InputError, NotFoundError
from luthier.evaluate.graders.template import item_fields
from luthier.evaluate.item_schema import ItemSchema
from luthier.records.eval import MAX_CRITERIA, CustomData, Eval, LoggedData
from luthier.records.grader import Grader, LabelModelGrader, ScoreModelGrader, StringCheckGrader, TextSimilarityGrader
from luthier.records.stored import Metadata, Page, new_id, now
from luthier.serve.field_errors import Place
from luthier.store.collection import Order
from luthier.store.store import Store
from luthier.workflows.graders import check_grader, read_grader
from luthier.workflows.written import read_written, refused

Json = dict[str, Any]
DATA: dict[str, type[CustomData | LoggedData]] = {
    "custom": CustomData,
    "logs": LoggedData,
    "stored_completions": LoggedData,
}
CRITERIA = ("string_check", "text_similarity", "label_model", "score_model", "python")
ANY_OBJECT: Json = {"type": "object"}
SAMPLE_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "choices": {"type": "array", "items": ANY_OBJECT},
        "output_text": {"type": "string"},
        "output_json": ANY_OBJECT,
        "output_tools": {"type": "array", "items": ANY_OBJECT},
    },
    "required": ["model", "choices"],
}


async def create_eval(
    store: Store,
    project: str,
    name: str | None,
    data_source_config: Json,
    criteria: Sequence[Json],
    metadata: Metadata | None,
) -> Eval:
    """Keep an eval whose graders can work here.

    Raises:
        ApiError: 400; it names the field.
    """
    data = read_written(DATA, data_source_config, ("data_source_config",))
    schema = schema_of(data, ("data_source_config", "item_schema"))
    if not 0 < len(criteria) <= MAX_CRITERIA:
        raise refused(("testing_criteria",), f"1 to {MAX_CRITERIA} graders, not {len(criteria)}")
    names: set[str] = set()
    for number, written in enumerate(criteria):
        grader = _read_criterion(written, ("testing_criteria", number), schema)
        if grader.name in names:
            raise refused(("testing_criteria", number, "name"), f"there is another grader {grader.name!r}")
        names.add(grader.name)
        await check_grader(store, grader, ("testing_criteria", number))
    id, moment = new_id("eval_"), now()
    made = Eval(
        id=id,
        project=project,
        created_at=moment,
        updated_at=moment,
        metadata=metadata,
        name=name or id,
        data_source_config=data_source_config,
        testing_criteria=tuple(criteria),
    )
    return await asyncio.to_thread(store.evals.evals.add, made)


def list_evals(
    store: Store,
    project: str,
    *,
    after: str | None = None,
    limit: int = 20,
    order: Order = "asc",
    order_by: Literal["created_at", "updated_at"] = "created_at",
) -> Page[Eval]:
    """Return a part of a project's evals.

    Raises:
        NotFoundError: there is none with the id ``after``.
    """
    if order_by == "created_at":
        return store.evals.evals.page(project, after=after, limit=limit, order=order)
    if after is not None:
        store.evals.evals.get(project, after)
    found = sorted(store.evals.evals.all(project), key=lambda it: it.updated_at, reverse=order == "desc")
    start = next((place + 1 for place, it in enumerate(found) if it.id == after), 0)
    return Page(items=tuple(found[start : start + limit]), has_more=len(found) > start + limit)


def change_eval(store: Store, project: str, id: str, changes: Mapping[str, Any]) -> Eval:
    """Give an eval another name or other labels.

    Raises:
        NotFoundError: the project has none of that id.
    """
    update = {**changes, "updated_at": now()}
    return store.evals.evals.change(project, id, lambda it: it.model_copy(update=update))


def delete_eval(store: Store, project: str, id: str) -> None:
    """Delete an eval with its runs; those that are not finished are cancelled.

    Raises:
        NotFoundError: the project has none of that id.
    """
    store.evals.evals.remove(project, id)
    for run in list(store.evals.runs.all(project, parent=id)):
        with suppress(NotFoundError):
            remove_run(store, project, run.id)


def remove_run(store: Store, project: str, id: str) -> None:
    """Delete a run with its items; one that has not ended is cancelled.

    Raises:
        NotFoundError: the project has no such run.
    """
    store.evals.remove_run(project, id)
    with suppress(NotFoundError, ConflictError):
        store.runs.request(id, "cancel")
    shutil.rmtree(store.run_folder(id), ignore_errors=True)


def schema_of(data: CustomData | LoggedData, place: Place) -> ItemSchema | None:
    """Return what items have to fit; None where they come from the log.

    Raises:
        ApiError: 400, where it is no JSON schema.
    """
    if isinstance(data, LoggedData):
        return None
    try:
        return ItemSchema(data.item_schema)
    except InputError as error:
        raise refused(place, str(error)) from error


def data_of(eval: Eval) -> CustomData | LoggedData:
    """Return where an eval's items come from."""
    return read_written(DATA, eval.data_source_config, ("data_source_config",))


def eval_object(eval: Eval) -> Json:
    """Return an eval as ``eval``."""
    data = data_of(eval)
    if isinstance(data, LoggedData):
        properties, labels = {"item": ANY_OBJECT, "sample": SAMPLE_SCHEMA}, {"metadata": data.metadata}
    else:
        sample = {"sample": SAMPLE_SCHEMA} if data.include_sample_schema else {}
        properties, labels = {"item": data.item_schema} | sample, {}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "id": eval.id,
        "object": "eval",
        "name": eval.name,
        "created_at": eval.created_at,
        "data_source_config": {"type": data.type, "schema": schema, **labels},
        "testing_criteria": list(eval.testing_criteria),
        "metadata": eval.metadata or {},
    }


def _read_criterion(written: Any, place: Place, schema: ItemSchema | None) -> Grader:
    grader = read_grader(written, place, CRITERIA)
    if isinstance(grader, TextSimilarityGrader) and grader.pass_threshold is None:
        raise refused((*place, "pass_threshold"), "Field required", kind="missing")
    for field, text in _texts(grader):
        lacking = schema.lacks(item_fields(text)) if schema else []
        if lacking:
            raise refused((*place, field), f"item.{lacking[0]} is not in item_schema, which allows nothing else")
    return grader


def _texts(grader: Grader) -> list[tuple[str, str]]:
    if isinstance(grader, StringCheckGrader | TextSimilarityGrader):
        return [("input", grader.input), ("reference", grader.reference)]
    if isinstance(grader, LabelModelGrader | ScoreModelGrader):
        return [("input", message.text) for message in grader.input]
    return []
