"""A run is held by one owner at a time, loses nobody, and remembers what it said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import ConflictError, NotFoundError
from luthier.records.run import Run, RunRequest, RunStatus
from luthier.store.runs import MAX_ATTEMPTS
from luthier.store.store import Store

CLAIMER = """
import json, sys
from pathlib import Path
from luthier.store.store import Store

home, owner = Path(sys.argv[1]), sys.argv[2]
store = Store(home)
print("ready", flush=True)
sys.stdin.readline()
taken = []
while (run := store.runs.claim(owner, 600, lambda owner: False)) is not None:
    taken.append(run.id)
    store.runs.add_event(run.id, owner)
print(json.dumps(taken))
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def nobody_is_dead(_owner: str) -> bool:
    return False


def claim(
    store: Store,
    owner: str = "one",
    seconds: float = 600,
    is_dead: Callable[[str], bool] = nobody_is_dead,
    run_id: str | None = None,
) -> Run | None:
    return store.runs.claim(owner, seconds, is_dead, run_id)


def run_with(store: Store, status: RunStatus) -> str:
    """Bring a run to a status by the way that runs take."""
    store.runs.add("run", "train", {"epochs": 1})
    if status == "queued":
        return "run"
    claim(store)
    if status != "running":
        store.runs.finish("run", "one", status, error="broken" if status == "failed" else None)
    return "run"


# Claiming


def test_oldest_run_is_taken_first(store: Store) -> None:
    for name in ("b", "a", "c"):
        store.runs.add(name, "train", {})
    assert [run.id for run in (claim(store), claim(store), claim(store)) if run] == ["b", "a", "c"]
    assert claim(store) is None


def test_taken_run_knows_its_owner_its_lease_and_its_attempt(store: Store) -> None:
    added = store.runs.add("run", "train", {"epochs": 3, "name": "é"})
    assert (added.status, added.attempts, added.owner, added.config) == ("queued", 0, None, {"epochs": 3, "name": "é"})
    run = claim(store)
    assert run == store.runs.get("run")
    assert run is not None
    assert (run.status, run.attempts, run.owner) == ("running", 1, "one")
    assert run.started_at is not None
    assert run.lease_until is not None
    assert run.lease_until > run.started_at


def test_certain_run_can_be_taken_out_of_its_turn(store: Store) -> None:
    for name in ("a", "b"):
        store.runs.add(name, "train", {})
    taken = claim(store, run_id="b")
    assert taken is not None
    assert taken.id == "b"
    assert claim(store, run_id="b") is None
    assert claim(store, run_id="none") is None


@pytest.mark.parametrize("status", ["paused", "succeeded", "failed", "cancelled", "running"])
def test_run_that_does_not_wait_is_not_taken(store: Store, status: RunStatus) -> None:
    run_with(store, status)
    assert claim(store, "two") is None


def test_processes_that_share_a_queue_never_take_the_same_run(store: Store) -> None:
    names = [f"run-{number:02d}" for number in range(25)]
    for name in names:
        store.runs.add(name, "train", {})
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(store.home), f"owner-{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for claimer in claimers:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "ready\n"
    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    taken = [json.loads(claimer.communicate()[0]) for claimer in claimers]
    assert sorted(name for names in taken for name in names) == names
    for number, mine in enumerate(taken):
        assert all(store.runs.get(name).owner == f"owner-{number}" for name in mine)
        assert all([event.message for event in store.runs.events(name)] == [f"owner-{number}"] for name in mine)


def test_run_with_an_expired_lease_is_taken_over(store: Store) -> None:
    store.runs.add("run", "train", {})
    claim(store, "one", seconds=-1)
    taken = claim(store, "two")
    assert taken is not None
    assert (taken.owner, taken.attempts) == ("two", 2)


def test_run_of_a_dead_owner_is_taken_over_before_its_lease_ends(store: Store) -> None:
    store.runs.add("run", "train", {})
    claim(store, "one")
    assert claim(store, "two") is None
    taken = claim(store, "two", is_dead=lambda owner: owner == "one")
    assert taken is not None
    assert (taken.owner, taken.attempts) == ("two", 2)


def test_run_whose_owners_keep_dying_fails(store: Store) -> None:
    store.runs.add("run", "train", {})
    store.runs.add("next", "train", {})
    for attempt in range(1, MAX_ATTEMPTS + 1):
        taken = claim(store, f"owner-{attempt}", is_dead=lambda owner: True, run_id="run")
        assert taken is not None
        assert taken.attempts == attempt
    taken = claim(store, "last", is_dead=lambda owner: True)
    assert taken is not None
    assert taken.id == "next"
    run = store.runs.get("run")
    assert (run.status, run.owner, run.lease_until) == ("failed", None, None)
    assert run.error == f"The process that ran it died {MAX_ATTEMPTS} times."


# Holding


def test_renewed_lease_lasts_longer_and_brings_the_request(store: Store) -> None:
    run_with(store, "running")
    before = store.runs.get("run").lease_until
    assert store.runs.renew("run", "one", 6_000) is None
    after = store.runs.get("run").lease_until
    assert before is not None
    assert after is not None
    assert after > before
    store.runs.request("run", "pause")
    assert store.runs.renew("run", "one", 600) == "pause"


def test_only_the_owner_renews_and_finishes(store: Store) -> None:
    run_with(store, "running")
    with pytest.raises(ConflictError, match="not held by two"):
        store.runs.renew("run", "two", 600)
    with pytest.raises(ConflictError, match="not held by two"):
        store.runs.finish("run", "two", "succeeded")
    assert store.runs.get("run").status == "running"


def test_owner_that_lost_its_run_can_neither_renew_nor_finish_it(store: Store) -> None:
    store.runs.add("run", "train", {})
    claim(store, "one", seconds=-1)
    claim(store, "two")
    with pytest.raises(ConflictError):
        store.runs.renew("run", "one", 600)
    with pytest.raises(ConflictError):
        store.runs.finish("run", "one", "succeeded", result={"loss": 1})
    assert store.runs.get("run").owner == "two"


def test_finished_run_cannot_be_renewed(store: Store) -> None:
    run_with(store, "succeeded")
    with pytest.raises(ConflictError):
        store.runs.renew("run", "one", 600)


def test_finished_run_keeps_its_result_and_lets_go_of_its_owner(store: Store) -> None:
    run_with(store, "running")
    store.runs.finish("run", "one", "succeeded", result={"loss": 0.25})
    run = store.runs.get("run")
    assert (run.status, run.result, run.error, run.owner, run.lease_until) == (
        "succeeded",
        {"loss": 0.25},
        None,
        None,
        None,
    )
    assert run.finished_at is not None
    assert run.is_finished


# Requests

REQUESTS: list[tuple[RunStatus, RunRequest, RunStatus | None]] = [
    ("queued", "pause", "paused"),
    ("queued", "cancel", "cancelled"),
    ("running", "pause", "running"),
    ("running", "cancel", "running"),
    ("paused", "pause", "paused"),
    ("paused", "cancel", "cancelled"),
    ("succeeded", "pause", None),
    ("succeeded", "cancel", None),
    ("failed", "pause", None),
    ("failed", "cancel", "cancelled"),
    ("cancelled", "cancel", None),
]


@pytest.mark.parametrize(("status", "request_", "expected"), REQUESTS)
def test_request_acts_at_once_unless_the_run_is_running_or_finished(
    store: Store, status: RunStatus, request_: RunRequest, expected: RunStatus | None
) -> None:
    run_with(store, status)
    if expected is None:
        with pytest.raises(ConflictError, match=f"already {status}"):
            store.runs.request("run", request_)
        assert store.runs.get("run").status == status
        return
    run = store.runs.request("run", request_)
    assert run.status == expected
    assert run.request == (request_ if status == "running" else None)


@pytest.mark.parametrize("status", ["paused", "failed"])
def test_stopped_run_goes_back_into_the_queue_as_new(store: Store, status: RunStatus) -> None:
    run_with(store, status)
    run = store.runs.requeue("run")
    assert (run.status, run.attempts, run.error, run.request, run.finished_at) == ("queued", 0, None, None, None)
    taken = claim(store, "two")
    assert taken is not None
    assert (taken.owner, taken.attempts) == ("two", 1)


@pytest.mark.parametrize("status", ["queued", "running"])
def test_run_that_waits_or_runs_is_left_as_it_is_by_requeueing(store: Store, status: RunStatus) -> None:
    run_with(store, status)
    before = store.runs.get("run")
    assert store.runs.requeue("run") == before


@pytest.mark.parametrize("status", ["succeeded", "cancelled"])
def test_run_that_has_ended_for_good_is_not_queued_again(store: Store, status: RunStatus) -> None:
    run_with(store, status)
    with pytest.raises(ConflictError, match=f"is {status}; only a paused or failed one can be resumed"):
        store.runs.requeue("run")
    assert store.runs.get("run").status == status


def test_run_that_is_to_be_cancelled_is_not_paused(store: Store) -> None:
    store.runs.add("run", "train", {})
    store.runs.claim("host/1/1.00", 600, lambda owner: False)
    store.runs.request("run", "cancel")
    with pytest.raises(ConflictError, match="waits to be cancelled"):
        store.runs.request("run", "pause")
    assert store.runs.get("run").request == "cancel"


def test_attempts_are_forgotten_by_the_owner_alone(store: Store) -> None:
    store.runs.add("run", "train", {})
    for number in (1, 2):
        store.runs.claim(f"host/{number}/1.00", 600, lambda owner: True)
    store.runs.forget_attempts("run", "host/1/1.00")
    assert store.runs.get("run").attempts == 2
    store.runs.forget_attempts("run", "host/2/1.00")
    assert store.runs.get("run").attempts == 1


def test_only_what_is_to_be_cancelled_is_asked_for(store: Store) -> None:
    for name in ("one", "two"):
        store.runs.add(name, "train", {})
        store.runs.claim("host/1/1.00", 0, lambda owner: True, name)
    store.runs.request("two", "cancel")
    assert [run.id for run in store.runs.waiting(("train",), lambda owner: True)] == ["one", "two"]
    assert [run.id for run in store.runs.waiting(("train",), lambda owner: True, to_cancel=True)] == ["two"]


def test_request_of_a_run_whose_owner_died_is_seen_by_the_next_owner(store: Store) -> None:
    run_with(store, "running")
    store.runs.request("run", "cancel")
    taken = claim(store, "two", is_dead=lambda owner: True)
    assert taken is not None
    assert taken.request == "cancel"


@pytest.mark.parametrize(
    "use",
    [
        lambda runs: runs.get("none"),
        lambda runs: runs.request("none", "cancel"),
        lambda runs: runs.requeue("none"),
    ],
)
def test_unknown_run_is_not_found(store: Store, use: Callable[[Any], object]) -> None:
    with pytest.raises(NotFoundError, match="no run 'none'"):
        use(store.runs)


def test_runs_are_listed_with_the_newest_first_and_by_status(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.runs.add(name, "train", {})
    claim(store)
    assert [run.id for run in store.runs.all()] == ["c", "b", "a"]
    assert [run.id for run in store.runs.all(status="queued")] == ["c", "b"]
    assert [run.id for run in store.runs.all(limit=1)] == ["c"]


# Events


def test_events_keep_their_order_and_survive_reopening(store: Store) -> None:
    run_with(store, "running")
    store.runs.add("other", "train", {})
    for number in range(5):
        store.runs.add_event("run", f"message {number}", data={"step": number})
        store.runs.add_event("other", "elsewhere")
    store.close()
    events = Store(store.home).runs.events("run")
    assert [(event.sequence, event.message) for event in events] == [(n + 1, f"message {n}") for n in range(5)]
    assert events[3].data == {"step": 3}
    assert [event.created_at for event in events] == sorted(event.created_at for event in events)


def test_events_are_read_on_from_where_one_stopped_and_by_type(store: Store) -> None:
    run_with(store, "running")
    store.runs.add_event("run", "first")
    store.runs.add_event("run", "loss", type="metrics", data={"loss": 1.5})
    store.runs.add_event("run", "oh", level="warning")
    assert [event.message for event in store.runs.events("run", after=1)] == ["loss", "oh"]
    assert [event.data for event in store.runs.events("run", type="metrics")] == [{"loss": 1.5}]
    assert [event.level for event in store.runs.events("run")] == ["info", "info", "warning"]
    assert store.runs.events("run", after=3) == []
