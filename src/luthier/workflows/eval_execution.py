"""Executes a run of an eval in the server process: write down its rows, sample and grade each, keep what came out.

All that a kill must not take is in the database, item by item, and in the run's folder: the rows as they were at the
beginning. Executed again, it goes on with the rows of which nothing is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.evaluate.graders.failure import GradingError
from luthier.evaluate.graders.grading import Grade, grade, sample_of
from luthier.evaluate.item_schema import ItemSchema
from luthier.jobs.resident_context import ResidentContext
from luthier.records.eval import (
    EvalRun,
    LoggedCompletions,
    LoggedResponses,
    ModelTally,
    OutputItem,
    RunSource,
    SamplingParams,
)
from luthier.records.grader import Grader
from luthier.records.stored import new_id, now
from luthier.serve.api_error import ApiError
from luthier.workflows.eval_rows import Row, read_written_rows, write_rows
from luthier.workflows.eval_runs import input_messages, read_plan, row_source
from luthier.workflows.eval_sampling import (
    LOGGED_INPUT,
    asked_messages,
    read_answer,
    request_of,
    shown_sample,
    usage_of,
)
from luthier.workflows.graders import read_grader, refusal_of, tools_of, usage_by_model

Json = dict[str, Any]
ROWS_FILE = "rows.jsonl"
ROWS_AT_ONCE = 32


async def execute_eval_run(context: ResidentContext) -> Json:
    """Execute a run, or go on with it, and return how many items passed, failed, and could not be graded.

    Raises:
        ApiError: a model that it names does not exist.
        InputError: its rows cannot be used.
        NotFoundError: it was deleted, or its file was.
        RunStopped: it was asked to pause or cancel.
        DiskFullError: the disk is full; it goes on when there is space again.
    """
    execution = await asyncio.to_thread(_Execution, context)
    return await execution.run()


class _Execution:
    """A run being executed."""

    def __init__(self, context: ResidentContext) -> None:
        self._context = context
        self._store = context.store
        self._plan = read_plan(context.folder)
        self._run = self._store.evals.runs.get(context.run.project, context.run.id)
        self._source = RunSource.model_validate(self._plan.data_source)
        self._params = self._source.sampling_params or SamplingParams()
        self._messages = input_messages(self._plan.data_source)
        self._responses = self._source.type == "responses"
        self._seeded = self._source.model is not None and not self._responses
        written = enumerate(self._plan.criteria)
        self._graders = [read_grader(one, ("testing_criteria", number)) for number, one in written]
        self._tools = tools_of(self._store, context.ask)
        self._rows = context.folder / ROWS_FILE
        self._pending: list[OutputItem] = []
        self._turn = asyncio.Lock()

    async def run(self) -> Json:
        if not self._rows.exists():
            total = await self._context.unless_asked(asyncio.to_thread(self._write_rows))
            await self._context.say(f"There are {total:,} items to evaluate")
        await self._context.unless_asked(self._work())
        run = await asyncio.to_thread(self._store.evals.runs.get, self._run.project, self._run.id)
        self._rows.unlink(missing_ok=True)
        return run.tally.model_dump(include={"passed", "failed", "errored"})

    def _write_rows(self) -> int:
        source = row_source(self._plan.data_source)
        if isinstance(source, LoggedCompletions | LoggedResponses) and source.metadata is None:
            source = source.model_copy(update={"metadata": self._plan.logged_metadata})
        schema = ItemSchema(self._plan.item_schema) if self._plan.item_schema is not None else None
        return write_rows(self._store, self._run.project, source, schema, self._rows)

    async def _work(self) -> None:
        kept = await asyncio.to_thread(self._store.evals.numbers, self._run)
        rows = read_written_rows(self._rows, kept)
        turn = asyncio.Lock()
        workers = [asyncio.create_task(self._evaluate_rows(rows, turn)) for _ in range(ROWS_AT_ONCE)]
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _evaluate_rows(self, rows: Iterator[Row], turn: asyncio.Lock) -> None:
        """Evaluate one row after the other; whoever is free takes the next, so that few are in memory."""
        while True:
            async with turn:
                row = await asyncio.to_thread(next, rows, None)
            if row is None:
                return
            await self._keep(await self._evaluate(row))

    async def _keep(self, item: OutputItem) -> None:
        """Keep an item; those that come together share a transaction."""
        self._pending.append(item)
        async with self._turn:
            items, self._pending = self._pending, []
            if items:
                await asyncio.to_thread(self._store.evals.keep, self._run, items)

    async def _evaluate(self, row: Row) -> OutputItem:
        sample, messages, used = _given_sample(row), _logged_messages(row), ModelTally()
        try:
            if self._source.model is not None:
                messages = await asyncio.to_thread(asked_messages, self._messages or LOGGED_INPUT, row.item)
                sample, used = await self._sample(self._source.model, messages)
        except GradingError as error:
            told = {"code": error.kind, "message": str(error)}
            shown = shown_sample(messages, {}, self._params, used, told, seeded=self._seeded)
            return _item(self._run, row, shown, [], {})
        grades = await asyncio.gather(*(grade(it, row.item, sample, self._tools) for it in self._graders))
        shown = shown_sample(messages, sample, self._params, used, seeded=self._seeded)
        tallies = {self._source.model: used} if self._source.model is not None else {}
        return _item(self._run, row, shown, list(zip(self._graders, grades, strict=True)), tallies)

    async def _sample(self, model: str, messages: list[Json]) -> tuple[Json, ModelTally]:
        path, body = request_of(model, messages, self._params, responses=self._responses)
        answer = await self._context.ask(path, body)
        if answer.status == 404:
            raise ApiError(404, refusal_of(answer), param="data_source.model", code="model_not_found")
        if answer.status != 200:
            raise GradingError("other_error", refusal_of(answer))
        return read_answer(answer.body, responses=self._responses), usage_of(answer.body)


def _given_sample(row: Row) -> Json:
    """Return the sample of a row, with what follows from its text; nothing where it has none."""
    given = {name: value for name, value in (row.sample or {}).items() if value is not None}
    if "output_text" not in given:
        return given
    return sample_of(given["output_text"], given.get("output_tools") or ()) | given


def _logged_messages(row: Row) -> list[Json]:
    """Return the messages that a row from the log answers."""
    found = row.item.get("input")
    return found if isinstance(found, list) and all(isinstance(one, dict) and "role" in one for one in found) else []


def _item(
    run: EvalRun, row: Row, sample: Json, graded: Sequence[tuple[Grader, Grade]], tallies: dict[str, ModelTally]
) -> OutputItem:
    usage = dict(tallies)
    for one in (exchange for _, found in graded for exchange in found.exchanges):
        (name, counted), *_ = usage_by_model([one]).items()
        usage[name] = usage.get(name, ModelTally()) + ModelTally(**counted)
    errored = not graded or any(found.is_error for _, found in graded)
    passed = all(found.passed for _, found in graded)
    return OutputItem(
        id=new_id("outputitem_"),
        project=run.project,
        created_at=now(),
        parent=run.id,
        eval_id=run.parent,
        status="error" if errored else "pass" if passed else "fail",
        number=row.number,
        item=row.item,
        sample=sample,
        results=tuple(_result(grader, found) for grader, found in graded),
        usage=usage,
    )


def _result(grader: Grader, found: Grade) -> Json:
    result: Json = {"name": grader.name, "type": grader.type, "score": found.score, "passed": found.passed}
    if found.exchanges:
        last = found.exchanges[-1]
        answers = [choice["message"] for choice in last.completion["choices"]]
        result["sample"] = {"model": last.model, "input": last.request["messages"], "output": answers}
    if found.failures:
        first = found.failures[0]
        result["error"] = {"code": first.kind, "message": str(first)}
    return result
