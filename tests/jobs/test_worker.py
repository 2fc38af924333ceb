"""A worker executes a run, and whatever happens the run's row says so; killed, it leaves the run to the next one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from luthier.errors import CapacityError, ConflictError, InputError
from luthier.jobs import worker
from luthier.jobs.context import RunContext
from luthier.jobs.launch import log_path, start
from luthier.jobs.worker import is_dead, this_owner, work
from luthier.records.run import Run
from luthier.store.runs import MAX_ATTEMPTS
from luthier.store.store import Store

PATIENCE_SECONDS = 60
LAUNCHER = """
import sys

sys.path.insert(0, {folder!r})
from luthier.jobs import worker

worker.WORKFLOWS["train"] = "test_worker:{workflow}"
worker.RENEW_SECONDS = 0.05
worker.main()
"""


# Workflows


def succeed(context: RunContext) -> dict[str, Any]:
    with (context.folder / "executed.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    with context.stage("train"):
        context.say("half way", data={"step": 1})
        context.progress("training", 1, 2)
        context.metrics("loss 0.5", {"loss": 0.5})
    return {"loss": 0.5, "epochs": context.run.config["epochs"]}


def refuse(context: RunContext) -> dict[str, Any]:
    raise InputError("The label is missing.", hint="add one", problems=["line 3: no label"])


def break_down(context: RunContext) -> dict[str, Any]:
    print("something printed")  # noqa: T201 - what a workflow prints belongs into its log
    raise ZeroDivisionError("a surprise")


def run_out_of_disk_once(context: RunContext) -> dict[str, Any]:
    checkpoint = context.folder / "checkpoint"
    if checkpoint.exists():
        return {"went_on_from": checkpoint.read_text()}
    checkpoint.write_text("step 7")
    Path("/dev/full").write_bytes(b"weights")
    return {}


def run_out_of_memory(context: RunContext) -> dict[str, Any]:
    raise CapacityError("The plan needs 9 GB, the machine has 8 GB.")


def pause_itself(context: RunContext) -> dict[str, Any]:
    context.store.runs.request(context.run.id, "pause")
    return wait_for_ever(context)


def cancel_itself(context: RunContext) -> dict[str, Any]:
    context.store.runs.request(context.run.id, "cancel")
    return wait_for_ever(context)


def wait_for_ever(context: RunContext) -> dict[str, Any]:
    (context.folder / "pid").write_text(str(os.getpid()))
    until = time.monotonic() + PATIENCE_SECONDS  # a test that fails leaves no process behind for ever
    while time.monotonic() < until:
        context.stop_if_asked()
        time.sleep(0.01)
    raise TimeoutError("nobody stopped the run")


def wait_in_the_first_attempt(context: RunContext) -> dict[str, Any]:
    context.say(f"attempt {context.run.attempts}")
    return wait_for_ever(context) if context.run.attempts == 1 else {"attempt": context.run.attempts}


def die(context: RunContext) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def die_but_come_forward(context: RunContext) -> dict[str, Any]:
    count = len(context.store.runs.events(context.run.id))
    context.say("here")
    context.came_forward()
    return die(context) if count < 2 * MAX_ATTEMPTS else {"attempt": context.run.attempts}


def lose_the_run(context: RunContext) -> dict[str, Any]:
    context.store.runs.claim("host/1/1.00", 600, lambda owner: True, context.run.id)
    return {}


# Parts


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home")
    yield store
    store.close()


def launcher(folder: Path, workflow: str) -> list[str]:
    """Return the command line of a worker process that executes a workflow of this module."""
    script = folder / f"{workflow}.py"
    script.write_text(LAUNCHER.format(folder=str(Path(__file__).parent), workflow=workflow))
    return [sys.executable, str(script)]


def execute(store: Store, monkeypatch: pytest.MonkeyPatch, workflow: str) -> Run:
    """Execute a workflow of this module in this process."""
    monkeypatch.setitem(worker.WORKFLOWS, "train", f"{__name__}:{workflow}")
    monkeypatch.setattr(worker, "RENEW_SECONDS", 0.01)
    store.runs.add("run", "train", {"epochs": 3})
    assert work(store)
    return store.runs.get("run")


def messages(store: Store, run_id: str = "run") -> list[str]:
    return [event.message for event in store.runs.events(run_id)]


def log(store: Store, run_id: str = "run") -> str:
    path = log_path(store, run_id)
    return path.read_text() if path.exists() else ""


def wait_for_pid(store: Store) -> int:
    path = store.run_folder("run") / "pid"
    until = time.monotonic() + PATIENCE_SECONDS
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until, log(store)
        time.sleep(0.02)
    return int(path.read_text())


def owner_that_has_ended() -> str:
    command = [sys.executable, "-c", "from luthier.jobs.worker import this_owner; print(this_owner())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# Ends of a run


def test_result_of_the_workflow_is_stored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = execute(store, monkeypatch, "succeed")
    assert (run.status, run.result, run.error) == ("succeeded", {"loss": 0.5, "epochs": 3}, None)
    assert run.finished_at is not None
    assert not work(store)


def test_what_the_workflow_says_becomes_events_in_their_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(store, monkeypatch, "succeed")
    events = store.runs.events("run")
    assert [event.type for event in events] == ["stage", "message", "progress", "metrics", "stage"]
    assert [event.data for event in events[:4]] == [
        {"stage": "train"},
        {"step": 1},
        {"done": 1, "total": 2},
        {"loss": 0.5},
    ]
    assert events[4].data["stage"] == "train"
    assert events[4].data["seconds"] >= 0


def test_expected_error_fails_the_run_with_its_message_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = execute(store, monkeypatch, "refuse")
    text = "The label is missing.\n  - line 3: no label\nHint: add one"
    assert (run.status, run.error, messages(store)) == ("failed", text, [text])
    assert store.runs.events("run")[0].level == "error"
    assert "Traceback" not in "".join(capsys.readouterr())


def test_unexpected_error_fails_the_run_and_its_traceback_is_printed(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = execute(store, monkeypatch, "break_down")
    assert run.status == "failed"
    assert run.error == "ZeroDivisionError: a surprise (traceback: luthier run logs --output run)"
    assert messages(store) == [run.error]
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert 'raise ZeroDivisionError("a surprise")' in printed


@pytest.mark.parametrize(("workflow", "status"), [("pause_itself", "paused"), ("cancel_itself", "cancelled")])
def test_run_stops_at_its_next_safe_point_when_asked(
    store: Store, monkeypatch: pytest.MonkeyPatch, workflow: str, status: str
) -> None:
    run = execute(store, monkeypatch, workflow)
    assert (run.status, run.owner, run.request, run.error) == (status, None, None, None)
    hint = "\nHint: luthier run resume run" if status == "paused" else ""
    assert messages(store)[-1] == f"Stopped on request ({workflow.split('_')[0]}).{hint}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_disk_pauses_the_run_and_it_goes_on_when_resumed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = execute(store, monkeypatch, "run_out_of_disk_once")
    assert run.status == "paused"
    assert run.error is not None
    assert "The disk is full" in run.error
    assert messages(store) == [run.error]
    assert not work(store)
    store.runs.requeue("run")
    assert work(store)
    run = store.runs.get("run")
    assert (run.status, run.result, run.error) == ("succeeded", {"went_on_from": "step 7"}, None)


def test_lack_of_memory_fails_the_run_with_its_message(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = execute(store, monkeypatch, "run_out_of_memory")
    assert (run.status, run.error) == ("failed", "The plan needs 9 GB, the machine has 8 GB.")


def test_workflow_that_cannot_be_imported_fails_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = execute(store, monkeypatch, "no_such_workflow")
    assert run.status == "failed"
    assert run.error is not None
    assert run.error.startswith("AttributeError")


def test_run_that_was_lost_to_another_owner_is_not_finished_by_the_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worker.WORKFLOWS, "train", f"{__name__}:lose_the_run")
    store.runs.add("run", "train", {})
    with pytest.raises(ConflictError, match="not held"):
        work(store)
    run = store.runs.get("run")
    assert (run.status, run.owner, run.result) == ("running", "host/1/1.00", None)


# Whose turn it is


def test_worker_without_work_says_so(store: Store) -> None:
    assert not work(store)
    assert not work(store, "no-such-run")


def test_named_run_is_executed_out_of_its_turn(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.WORKFLOWS, "train", f"{__name__}:succeed")
    for name in ("first", "second"):
        store.runs.add(name, "train", {"epochs": 1})
    assert work(store, "second")
    assert [store.runs.get(name).status for name in ("first", "second")] == ["queued", "succeeded"]


def test_run_of_a_process_that_ended_is_taken_up_and_its_history_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worker.WORKFLOWS, "train", f"{__name__}:succeed")
    store.runs.add("run", "train", {"epochs": 1})
    store.runs.claim(owner_that_has_ended(), 600, is_dead)
    assert work(store)
    run = store.runs.get("run")
    assert (run.status, run.attempts) == ("succeeded", 2)
    first = store.runs.events("run")[0]
    assert (first.level, "attempt 2 goes on" in first.message) == ("warning", True)


def test_cancellation_that_a_dead_process_did_not_see_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.WORKFLOWS, "train", f"{__name__}:succeed")
    store.runs.add("run", "train", {"epochs": 1})
    store.runs.claim(owner_that_has_ended(), 600, is_dead)
    store.runs.request("run", "cancel")
    assert work(store)
    assert store.runs.get("run").status == "cancelled"


def test_owner_is_dead_when_its_process_has_ended() -> None:
    assert not is_dead(this_owner())
    assert is_dead(owner_that_has_ended())


def test_owner_is_dead_when_its_process_id_belongs_to_another_process_by_now() -> None:
    host, pid, started = this_owner().split("/")
    assert is_dead(f"{host}/{pid}/{float(started) - 100:.2f}")


def test_owner_on_another_host_is_never_taken_for_dead() -> None:
    assert not is_dead(f"not-{socket.gethostname()}/1/1.00")


def test_killed_process_is_dead_before_its_parent_has_noticed() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = f"{socket.gethostname()}/{process.pid}/{psutil.Process(process.pid).create_time():.2f}"
    assert not is_dead(owner)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert is_dead(owner)
    process.communicate()


# Processes


def test_process_of_its_own_executes_the_run_and_ends(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {"epochs": 3})
    assert start(store, "run", launcher(tmp_path, "succeed")).wait(PATIENCE_SECONDS) == 0, log(store)
    assert store.runs.get("run").result == {"loss": 0.5, "epochs": 3}


def test_log_of_a_run_has_the_traceback_of_an_unexpected_error_and_what_was_printed(
    store: Store, tmp_path: Path
) -> None:
    store.runs.add("run", "train", {})
    start(store, "run", launcher(tmp_path, "break_down")).wait(PATIENCE_SECONDS)
    assert store.runs.get("run").status == "failed"
    assert "something printed" in log(store)
    assert "Traceback (most recent call last)" in log(store)


def test_log_of_a_run_has_no_traceback_of_an_expected_error(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    start(store, "run", launcher(tmp_path, "refuse")).wait(PATIENCE_SECONDS)
    assert store.runs.get("run").status == "failed"
    assert "Traceback" not in log(store)


def test_request_reaches_a_running_process(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    process = start(store, "run", launcher(tmp_path, "wait_for_ever"))
    wait_for_pid(store)
    assert store.runs.request("run", "cancel").status == "running"
    assert process.wait(PATIENCE_SECONDS) == 0
    assert store.runs.get("run").status == "cancelled"


def test_run_of_a_killed_process_is_finished_by_another_and_its_history_says_so(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    command = launcher(tmp_path, "wait_in_the_first_attempt")
    process = start(store, "run", command)
    os.kill(wait_for_pid(store), signal.SIGKILL)
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert store.runs.get("run").status == "running"
    assert start(store, "run", command).wait(PATIENCE_SECONDS) == 0, log(store)
    run = store.runs.get("run")
    assert (run.status, run.attempts, run.result) == ("succeeded", 2, {"attempt": 2})
    first, notice, second = messages(store)
    assert (first, second) == ("attempt 1", "attempt 2")
    assert "ended early" in notice


def test_run_that_kills_its_process_every_time_fails(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    command = launcher(tmp_path, "die")
    codes = [start(store, "run", command).wait(PATIENCE_SECONDS) for _ in range(MAX_ATTEMPTS + 1)]
    assert codes == [-signal.SIGKILL] * MAX_ATTEMPTS + [0]
    run = store.runs.get("run")
    assert (run.status, run.error) == ("failed", f"The process that ran it died {MAX_ATTEMPTS} times.")


def test_run_that_comes_forward_between_its_deaths_goes_on(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    command = launcher(tmp_path, "die_but_come_forward")
    codes = [start(store, "run", command).wait(PATIENCE_SECONDS)]
    while store.runs.get("run").status == "running":
        codes.append(start(store, "run", command).wait(PATIENCE_SECONDS))
    assert len(codes) > MAX_ATTEMPTS
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    assert store.runs.get("run").status == "succeeded"


def test_process_whose_run_was_taken_over_stops_at_once(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {})
    process = start(store, "run", launcher(tmp_path, "wait_for_ever"))
    wait_for_pid(store)
    assert store.runs.claim("host/1/1.00", 600, lambda owner: True) is not None
    assert process.wait(PATIENCE_SECONDS) == 3
    assert "taken over by another process" in log(store)
    assert store.runs.get("run").owner == "host/1/1.00"


def test_two_processes_for_one_run_execute_it_once(store: Store, tmp_path: Path) -> None:
    store.runs.add("run", "train", {"epochs": 1})
    command = launcher(tmp_path, "succeed")
    processes = [start(store, "run", command) for _ in range(2)]
    assert [process.wait(PATIENCE_SECONDS) for process in processes] == [0, 0]
    assert len((store.run_folder("run") / "executed.txt").read_text().split()) == 1
    assert (store.runs.get("run").status, store.runs.get("run").attempts) == ("succeeded", 1)


def test_workers_on_one_home_share_the_queue_and_execute_each_run_once(store: Store, tmp_path: Path) -> None:
    names = [f"run-{number}" for number in range(8)]
    for name in names:
        store.runs.add(name, "train", {"epochs": 1})
    command = [*launcher(tmp_path, "succeed"), "--home", str(store.home), "--poll-seconds", "0.05"]
    workers = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while any(not store.runs.get(name).is_finished for name in names) and time.monotonic() < until:
            time.sleep(0.05)
        assert all(process.poll() is None for process in workers)
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert [store.runs.get(name).status for name in names] == ["succeeded"] * 8
    executed = [(store.run_folder(name) / "executed.txt").read_text().split() for name in names]
    assert [len(pids) for pids in executed] == [1] * 8
