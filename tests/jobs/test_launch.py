"""A run is put into the queue, executed by a process of its own, and followed to its end whatever its process does."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_worker import PATIENCE_SECONDS, launcher, log, messages, wait_for_pid

from luthier.errors import EngineError
from luthier.jobs.launch import follow, log_path, start, submit
from luthier.records.run import Run, RunEvent
from luthier.records.training import TrainingConfig
from luthier.store.runs import MAX_ATTEMPTS
from luthier.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home")
    yield store
    store.close()


def test_submitted_run_waits_in_the_queue_under_a_name_of_its_own(store: Store) -> None:
    runs = [submit(store, "train", TrainingConfig(epochs=number + 1)) for number in range(20)]
    assert all(re.fullmatch(r"train-\d{6}-[0-9a-f]{8}", run.id) for run in runs)
    assert len({run.id for run in runs}) == 20
    assert {run.status for run in store.runs.all()} == {"queued"}
    assert TrainingConfig.model_validate(runs[3].config).epochs == 4


def test_followed_run_is_executed_and_its_events_are_passed_on_in_order(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {"epochs": 3})
    seen: list[RunEvent] = []
    run = follow(store, "run", seen.append, worker=launcher(tmp_path, "succeed"))
    assert (run.status, run.result) == ("succeeded", {"loss": 0.5, "epochs": 3})
    assert seen == store.runs.events("run")
    assert [event.sequence for event in seen] == [1, 2, 3, 4, 5]


def test_run_that_has_ended_is_followed_to_its_end_at_once(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {"epochs": 3})
    follow(store, "run", worker=launcher(tmp_path, "succeed"))
    seen: list[int] = []
    assert follow(store, "run", lambda event: seen.append(event.sequence), after=3, worker=["/no/such/program"])
    assert seen == [4, 5]


def test_followed_run_that_fails_is_returned_with_its_error(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    seen: list[RunEvent] = []
    run = follow(store, "run", seen.append, worker=launcher(tmp_path, "refuse"))
    assert run.status == "failed"
    assert [event.message for event in seen] == [run.error]


@pytest.mark.parametrize(("workflow", "status"), [("pause_itself", "paused"), ("cancel_itself", "cancelled")])
def test_followed_run_that_stops_on_request_is_returned_with_its_last_message(
    store: Store, tmp_path: Path, workflow: str, status: str
) -> None:
    store.runs.add("run", "train", {})
    seen: list[RunEvent] = []
    assert follow(store, "run", seen.append, worker=launcher(tmp_path, workflow)).status == status
    assert "Stopped on request" in seen[-1].message


def test_follower_starts_another_process_when_the_first_is_killed(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    ended: list[Run] = []
    command = launcher(tmp_path, "wait_in_the_first_attempt")
    follower = threading.Thread(target=lambda: ended.append(follow(store, "run", worker=command)), daemon=True)
    follower.start()
    os.kill(wait_for_pid(store), signal.SIGKILL)
    follower.join(PATIENCE_SECONDS)
    assert [(run.status, run.result) for run in ended] == [("succeeded", {"attempt": 2})], log(store)
    assert [message for message in messages(store) if "ended early" in message]


def test_follower_gives_up_on_a_run_that_kills_its_process_every_time(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    run = follow(store, "run", worker=launcher(tmp_path, "die"))
    assert (run.status, run.attempts) == ("failed", MAX_ATTEMPTS)


def test_follower_of_a_run_whose_lease_ended_on_another_host_starts_a_process(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {"epochs": 1})
    store.runs.claim("elsewhere/1/1.00", -1, lambda owner: False)
    run = follow(store, "run", worker=launcher(tmp_path, "succeed"))
    assert (run.status, run.attempts) == ("succeeded", 2)


def test_process_that_ends_before_it_takes_the_run_up_is_an_error_and_not_started_for_ever(store: Store) -> None:
    store.runs.add("run", "train", {})
    broken = [sys.executable, "-c", "raise SystemExit('no module named luthier')"]
    with pytest.raises(EngineError, match="ended with code 1 before it took the run up") as caught:
        follow(store, "run", worker=broken)
    assert caught.value.hint == "luthier run logs --output run"
    assert log(store).count("no module named luthier") == 1
    assert store.runs.get("run").status == "queued"


def test_two_followers_of_one_run_see_the_same_and_it_is_executed_once(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {"epochs": 1})
    command = launcher(tmp_path, "succeed")
    seen: dict[int, list[int]] = {1: [], 2: []}

    def watch(number: int) -> None:
        follow(Store(store.home), "run", lambda event: seen[number].append(event.sequence), worker=command)

    followers = [threading.Thread(target=watch, args=(number,), daemon=True) for number in seen]
    for follower in followers:
        follower.start()
    for follower in followers:
        follower.join(PATIENCE_SECONDS)
    assert seen == {1: [1, 2, 3, 4, 5], 2: [1, 2, 3, 4, 5]}
    assert len((store.run_folder("run") / "executed.txt").read_text().split()) == 1


def test_started_process_is_not_in_the_session_of_its_starter(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    process = start(store, "run", launcher(tmp_path, "wait_for_ever"))
    pid = wait_for_pid(store)
    assert os.getsid(pid) == pid == process.pid
    store.runs.request("run", "cancel")
    process.wait(PATIENCE_SECONDS)


def test_log_keeps_what_all_processes_of_a_run_printed(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    for _ in range(2):
        start(store, "run", launcher(tmp_path, "break_down")).wait(PATIENCE_SECONDS)
        store.runs.requeue("run")
    assert log_path(store, "run").read_text().count("something printed") == 2
