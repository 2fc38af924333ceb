"""Executes a batch in the server process: check the file, ask for every line, keep each answer, make the files.

All that a kill must not take lies in the run's folder: the requests (``input.jsonl``), the answers as they came
(``answers.jsonl``), and how far it is (``state.json``). Executed again, it goes on with the lines without an answer.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from luthier.errors import ConflictError, InputError, LuthierError, NotFoundError, RunStopped
from luthier.ingest.uploaded import read_requests
from luthier.jobs.resident_context import Answer, ResidentContext, end_tasks
from luthier.records.batch import BatchOutcome, BatchProblem, BatchRequest, BatchState
from luthier.records.dataset import BadRow
from luthier.records.example import Example
from luthier.records.stored import new_id, now
from luthier.workflows.batch_files import make_files
from luthier.workflows.batch_spool import AnswerSpool, Row, succeeded
from luthier.workflows.batches import expiry_of, read_state, write_state
from luthier.workflows.files import file_path

INPUT_FILE, SPOOL_FILE = "input.jsonl", "answers.jsonl"
MAX_REQUESTS = 50_000
MAX_PROBLEMS = 100
ANSWERS_AT_ONCE = 32
STATE_SECONDS = 0.5
TOKENS = {"input_tokens": ("prompt_tokens", "input_tokens"), "output_tokens": ("completion_tokens", "output_tokens")}


async def execute_batch(context: ResidentContext) -> dict[str, Any]:
    """Execute a batch, or go on with it, and return the ids of its files.

    Raises:
        InputError: the file cannot be used; the state of the batch names its lines.
        ConflictError: the batch expired before all of its requests were answered.
        RunStopped: it was asked to pause or cancel.
        DiskFullError: the disk is full; it goes on when there is space again.
    """
    execution = _Execution(context)
    try:
        return await execution.run()
    except (LuthierError, OSError):
        raise
    except Exception:
        await execution.give_up()
        raise


async def end_batch(context: ResidentContext) -> None:
    """Make the files of what a batch has; nothing more is asked for.

    Raises:
        DiskFullError: the disk is full.
    """
    await _Execution(context).give_up()


class _Execution:
    """A batch being executed."""

    def __init__(self, context: ResidentContext) -> None:
        self._context = context
        self._folder = context.folder
        self._request = BatchRequest.model_validate(context.run.config)
        self._input = self._folder / INPUT_FILE
        self._state = read_state(self._folder)
        self._saving = threading.Lock()

    async def run(self) -> dict[str, Any]:
        if self._state.outcome == "failed":
            await self._change(outcome=None, finalizing_at=None, output_file_id=None, error_file_id=None)
        if self._state.outcome is not None:  # the server before this one died at the very end
            return self._result()
        if self._state.in_progress_at is None:
            await self._validate()
        async with self._spool() as spool:
            outcome = await self._answer_all(spool)
            await self._finalize(spool, outcome)
        return self._result()

    async def give_up(self) -> None:
        """Make the files of what there is, and keep what it takes to go on."""
        if self._state.in_progress_at is None or self._state.outcome not in (None, "failed"):
            return
        async with self._spool() as spool:
            await self._finalize(spool, "failed")

    @asynccontextmanager
    async def _spool(self) -> AsyncIterator[AnswerSpool]:
        """Open the answers, and count them anew."""
        spool = await asyncio.to_thread(AnswerSpool, self._folder / SPOOL_FILE)
        try:
            self._state = await asyncio.to_thread(_recounted, self._state, spool)
            yield spool
        finally:
            await spool.settle()
            await asyncio.to_thread(spool.close)

    # Check

    async def _validate(self) -> None:
        found = await self._context.unless_asked(asyncio.to_thread(self._check))
        await self._change(**found)
        if self._state.problems:
            message = "The input file cannot be used: " + self._state.problems[0].message
            raise InputError(message, problems=[_told(problem) for problem in self._state.problems[1:]])
        await self._context.say(f"The file has {self._state.total:,} requests; asking for their answers")

    def _check(self) -> dict[str, Any]:
        """Return what the file says of the state: the number of its requests and their model, or its problems."""
        problems: list[BatchProblem] = []
        models: set[str] = set()
        total = 0
        try:
            source = file_path(self._context.store, self._context.run.project, self._request.input_file_id)
            for row in read_requests(source):
                total += 1
                problem = self._problem(row)
                if problem is not None and len(problems) < MAX_PROBLEMS:
                    problems.append(problem)
                if isinstance(row, Example) and len(models) < 2:
                    models.add(str(row.fields["body"].get("model") or ""))
            if total > MAX_REQUESTS:
                message = f"The file has {total:,} requests, and a batch at most {MAX_REQUESTS:,}."
                problems.insert(0, BatchProblem(code="too_many_requests", message=message))
            if not total:
                problems.append(BatchProblem(code="empty_file", message="The file has no requests."))
            if problems:
                return {"problems": tuple(problems[:MAX_PROBLEMS])}
            _hold(source, self._input)
        except (NotFoundError, FileNotFoundError):
            message = f"There is no file {self._request.input_file_id!r} any more."
            return {"problems": (BatchProblem(code="file_not_found", message=message, param="input_file_id"),)}
        return {"total": total, "model": models.pop() or None if len(models) == 1 else None, "in_progress_at": now()}

    def _problem(self, row: Example | BadRow) -> BatchProblem | None:
        if isinstance(row, BadRow):
            name = row.reason.split(" ")[0].rstrip(":")
            param = name if name.partition(".")[0] in ("custom_id", "method", "url", "body") else None
            return BatchProblem(code="invalid_line", message=row.reason, line=row.line, param=param)
        url = row.fields["url"]
        if url != self._request.endpoint:
            message = f"url is {url!r}, and the endpoint of the batch is {self._request.endpoint!r}"
            return BatchProblem(code="mismatched_endpoint", message=message, line=row.line, param="url")
        return None

    # Ask

    async def _answer_all(self, spool: AnswerSpool) -> BatchOutcome:
        """Ask for all answers that are missing, and say how that ended.

        Raises:
            RunStopped: it was asked to pause.
        """
        state = self._state
        if state.completed + state.failed == state.total:
            return "completed"
        try:
            async with asyncio.timeout(expiry_of(self._context.run) - now()) as window:
                await self._context.unless_asked(self._work(spool))
        except RunStopped:
            if self._context.request != "cancel":
                raise
            await self._change(cancelling_at=now())
            return "cancelled"
        except TimeoutError:
            if not window.expired():
                raise
            return "expired"
        return "completed"

    async def _work(self, spool: AnswerSpool) -> None:
        lines = (row for row in read_requests(self._input) if isinstance(row, Example) and (row.line or 0) not in spool)
        turn = asyncio.Lock()
        workers = [asyncio.create_task(self._answer_lines(lines, turn, spool)) for _ in range(ANSWERS_AT_ONCE)]
        reporting = asyncio.create_task(self._report())
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                worker.result()
        finally:
            await end_tasks(reporting, *workers)

    async def _answer_lines(self, lines: Iterator[Example], turn: asyncio.Lock, spool: AnswerSpool) -> None:
        """Answer one line after the other; whoever is free takes the next, so that few are in memory."""
        while True:
            async with turn:
                line = await asyncio.to_thread(next, lines, None)
            if line is None or line.line is None:
                return
            answer = await self._context.ask(self._request.endpoint, line.fields["body"])
            row = _row(line, answer)
            await spool.keep(line.line, row)
            self._state = _counted(self._state, row)

    async def _report(self) -> None:
        """Show how far it is while it goes on."""
        shown = None
        while True:
            await asyncio.sleep(STATE_SECONDS)
            if shown is not self._state:
                shown = self._state
                await asyncio.to_thread(self._save)

    # End

    async def _finalize(self, spool: AnswerSpool, outcome: BatchOutcome) -> None:
        await spool.settle()
        if len(spool) != self._state.completed + self._state.failed:  # some were kept and, broken off, not counted
            self._state = await asyncio.to_thread(_recounted, self._state, spool)
        state = self._state
        unanswered = state.total - state.completed - state.failed if outcome == "expired" else 0
        await self._change(
            # Known before there is a file: resumed, the batch must not take these for the files of its end.
            outcome="failed" if outcome == "failed" else None,
            finalizing_at=state.finalizing_at or now(),
            output_file_id=state.output_file_id or (new_id("file-") if state.completed else None),
            error_file_id=state.error_file_id or (new_id("file-") if state.failed or unanswered else None),
        )
        run = self._context.run
        requests = (row for row in read_requests(self._input) if isinstance(row, Example))
        await asyncio.to_thread(
            make_files, self._context.store, run, self._request, self._state, requests, spool, outcome
        )
        await self._change(outcome=outcome, failed=state.failed + unanswered)
        if outcome != "failed":
            for name in (INPUT_FILE, SPOOL_FILE):
                (self._folder / name).unlink(missing_ok=True)
        counts = f"{self._state.completed:,} of {self._state.total:,} requests were answered"
        await self._context.say(f"{counts}, {self._state.failed:,} failed")

    def _result(self) -> dict[str, Any]:
        state = self._state
        if state.outcome == "cancelled":
            self._context.stop_if_asked()
            raise ConflictError("The batch was cancelled, and a batch that has ended does not go on.")
        if state.outcome == "expired":
            raise ConflictError(f"The batch expired: {state.completed:,} of {state.total:,} requests were answered.")
        return state.model_dump(include={"total", "completed", "failed", "output_file_id", "error_file_id"})

    async def _change(self, **values: Any) -> None:
        self._state = self._state.model_copy(update=values)
        await asyncio.to_thread(self._save)

    def _save(self) -> None:
        """Keep the newest state; a thread may still be at it whose coroutine was cancelled."""
        with self._saving:
            write_state(self._folder, self._state)


def _hold(source: Path, target: Path) -> None:
    """Have a file under a second name, so that it is there even if the first is deleted."""
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    try:
        os.link(source, fresh)
    except OSError:  # not every file system has links
        shutil.copyfile(source, fresh)
    fresh.replace(target)


def _told(problem: BatchProblem) -> str:
    return f"line {problem.line}: {problem.message}" if problem.line else problem.message


def _row(line: Example, answer: Answer) -> Row:
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}
    return {"id": new_id("batch_req_"), "custom_id": line.fields["custom_id"], "response": response, "error": None}


def _recounted(state: BatchState, spool: AnswerSpool) -> BatchState:
    fresh = {"completed": 0, "failed": 0, "input_tokens": 0, "output_tokens": 0}
    state = state.model_copy(update=fresh)
    for row in spool.rows():
        state = _counted(state, row)
    return state


def _counted(state: BatchState, row: Row) -> BatchState:
    if not succeeded(row):
        return state.model_copy(update={"failed": state.failed + 1})
    body = row["response"]["body"]
    usage = (body.get("usage") if isinstance(body, dict) else None) or {}
    tokens = {
        name: getattr(state, name) + next((usage[key] for key in keys if usage.get(key)), 0)
        for name, keys in TOKENS.items()
    }
    return state.model_copy(update={"completed": state.completed + 1, **tokens})
