"""The files of a batch that has ended: its answers in the order of its requests, and beside them what failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from luthier.errors import NotFoundError
from luthier.records.batch import BatchOutcome, BatchRequest, BatchState
from luthier.records.example import Example
from luthier.records.run import Run
from luthier.records.stored import new_id
from luthier.store.store import Store
from luthier.workflows.batch_spool import AnswerSpool
from luthier.workflows.batches import batch_id
from luthier.workflows.files import add_file, remove_remains

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


def make_files(
    store: Store,
    run: Run,
    request: BatchRequest,
    state: BatchState,
    requests: Iterator[Example],
    spool: AnswerSpool,
    outcome: BatchOutcome,
) -> None:
    """Make the files whose ids the state has; done again after a kill, there is still one of each.

    Args:
        store: Where they are kept.
        run: The run of the batch.
        request: The batch.
        state: Its state, with the ids of the files.
        requests: Its requests, in their order.
        spool: The answers.
        outcome: How the batch ended; if it expired, requests without an answer become errors.
    """
    folder = store.run_folder(run.id)
    _write(folder, requests, spool, outcome)
    for name, file_id in ((OUTPUT, state.output_file_id), (ERRORS, state.error_file_id)):
        if file_id is not None and not _is_there(store, run.project, file_id):
            remove_remains(store, file_id)
            with (folder / name).open("rb") as source:
                add_file(
                    store,
                    run.project,
                    f"{batch_id(run.id)}_{name}",
                    "batch_output",
                    source,
                    expires_after_seconds=request.output_expires_after_seconds,
                    id=file_id,
                )
        (folder / name).unlink()


def _write(folder: Path, requests: Iterator[Example], spool: AnswerSpool, outcome: BatchOutcome) -> None:
    with (folder / OUTPUT).open("wb") as answers, (folder / ERRORS).open("wb") as errors:
        for line in requests:
            number = line.line or 0
            if number in spool:
                row, succeeded = spool.get(number)
                (answers if succeeded else errors).write(row)
            elif outcome == "expired":
                lost = {"id": new_id("batch_req_"), "custom_id": line.fields["custom_id"], "response": None}
                errors.write(json.dumps(lost | {"error": EXPIRED}, ensure_ascii=False).encode() + b"\n")


def _is_there(store: Store, project: str, file_id: str) -> bool:
    try:
        store.files.get(project, file_id)
    except NotFoundError:
        return False
    return True
