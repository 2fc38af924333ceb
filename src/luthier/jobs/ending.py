"""How a run that did not succeed ends: whatever happened, its events and its row say so."""

from __future__ import annotations

from luthier.errors import DiskFullError, DivergedError, LuthierError, RunStopped
from luthier.records.run import Run, RunRequest, RunStatus
from luthier.store.store import Store


def stopped_on_request(run_id: str, request: RunRequest) -> RunStopped:
    """Return the error that ends a run where a person asked for it; after a pause it says how to go on."""
    hint = f"luthier run resume {run_id}" if request == "pause" else None
    return RunStopped(f"Stopped on request ({request}).", hint=hint)


def end_with_error(store: Store, run: Run, owner: str, error: Exception, request: RunRequest | None) -> None:
    """End a run, or its hold, because of an error: paused, cancelled, failed, or back into the queue.

    Args:
        store: Whose run.
        run: Which.
        owner: Who holds it.
        error: What its execution raised.
        request: What a person had asked of it; stopped without a request, it goes back into the queue.

    Raises:
        ConflictError: the run belongs to another owner by now.
    """
    if isinstance(error, RunStopped):
        store.runs.add_event(run.id, str(error), level="warning")
        if request is None:
            store.runs.hand_back(run.id, owner)
        else:
            store.runs.finish(run.id, owner, "cancelled" if request == "cancel" else "paused")
        return
    message = str(error)
    if not isinstance(error, LuthierError):
        message = f"{type(error).__name__}: {error} (traceback: luthier run logs --output {run.id})"
    store.runs.add_event(run.id, message, level="error")
    # After a full disk, what is finished stays, and the run goes on when there is space again; so does what was learned
    # before the numbers broke.
    status: RunStatus = "paused" if isinstance(error, DiskFullError | DivergedError) else "failed"
    store.runs.finish(run.id, owner, status, error=message)
