"""The server process executes runs itself: several at a time, in their order, and none is lost or executed twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import DivergedError, InputError
from luthier.jobs import resident_context
from luthier.jobs.launch import log_path
from luthier.jobs.resident import Executor, Residents
from luthier.jobs.resident_context import ENGINE_TRIES, Answer, ResidentContext
from luthier.records.access import Caller
from luthier.records.run import Run, RunStatus
from luthier.store.store import Store

PATIENCE_SECONDS = 60
SERVER = """
import asyncio, sys
from pathlib import Path

sys.path.insert(0, {folder!r})
from luthier.store.store import Store
from test_resident import count_up, living

async def main():
    async with living(Store(Path({home!r})), count_up):
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def nobody_answers(caller: Caller, method: str, path: str, body: dict[str, Any] | None) -> Answer:
    raise AssertionError("nothing was to be asked")


@asynccontextmanager
async def living(store: Store, executor: Executor, **options: Any) -> AsyncIterator[Residents]:
    residents = Residents(store, {"batch": executor}, options.pop("send", nobody_answers), **options)
    residents.start()
    try:
        yield residents
    finally:
        await residents.stop()


async def until(look: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not look():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home")
    yield store
    store.close()


def executed(store: Store, executor: Executor, status: RunStatus, **options: Any) -> Run:
    """Have one run executed until it has a status."""

    async def live() -> Run:
        store.runs.add("run", "batch", {})
        async with living(store, executor, **options):
            await until(lambda: store.runs.get("run").status == status)
        return store.runs.get("run")

    return asyncio.run(live())


# Executors


async def count_up(context: ResidentContext) -> dict[str, Any]:
    """Count to 30 in a file, going on where the one before stopped."""
    spool = context.folder / "numbers.txt"
    number = len(spool.read_text().split()) if spool.exists() else 0
    while number < 30:
        with spool.open("a") as file:
            file.write(f"{number}\n")
        number += 1
        await asyncio.sleep(0.01 if context.run.attempts > 1 else 0.2)
    return {"numbers": number}


async def wait_for_ever(context: ResidentContext) -> dict[str, Any]:
    await context.unless_asked(asyncio.Event().wait())
    return {}


# Tests


def test_runs_are_executed_in_their_order_and_no_more_than_so_many_at_once(store: Store) -> None:
    begun: list[str] = []
    free = asyncio.Event()

    async def wait(context: ResidentContext) -> dict[str, Any]:
        begun.append(context.run.id)
        await free.wait()
        return {"of": context.run.config["number"]}

    async def live() -> None:
        for number in range(5):
            store.runs.add(f"run-{number}", "batch", {"number": number})
        store.runs.add("other", "train", {})
        async with living(store, wait, at_once=2):
            await until(lambda: len(begun) == 2)
            await asyncio.sleep(0.6)
            assert begun == ["run-0", "run-1"]
            free.set()
            await until(lambda: all(run.status == "succeeded" for run in store.runs.all() if run.kind == "batch"))

    asyncio.run(live())
    assert begun == [f"run-{number}" for number in range(5)]
    assert store.runs.get("run-3").result == {"of": 3}
    assert store.runs.get("other").status == "queued"


def test_an_expected_error_fails_the_run_with_its_message(store: Store) -> None:
    async def refuse(context: ResidentContext) -> dict[str, Any]:
        raise InputError("The label is missing.")

    run = executed(store, refuse, "failed")
    assert (run.error, run.owner) == ("The label is missing.", None)
    assert store.runs.events("run")[-1].level == "error"


def test_a_surprise_fails_the_run_and_leaves_its_traceback_in_the_log(store: Store) -> None:
    async def break_down(context: ResidentContext) -> dict[str, Any]:
        raise ZeroDivisionError("a surprise")

    run = executed(store, break_down, "failed")
    assert run.error == "ZeroDivisionError: a surprise (traceback: luthier run logs --output run)"
    assert "in break_down" in log_path(store, "run").read_text()


def test_a_full_disk_pauses_the_run(store: Store) -> None:
    async def fill(context: ResidentContext) -> dict[str, Any]:
        Path("/dev/full").write_bytes(b"answers")
        return {}

    assert "The disk is full" in (executed(store, fill, "paused").error or "")


def test_training_that_diverges_pauses_the_run(store: Store) -> None:
    async def diverge(context: ResidentContext) -> dict[str, Any]:
        raise DivergedError("3 steps in a row had no finite loss.", hint="lower the learning rate")

    assert "Hint: lower the learning rate" in (executed(store, diverge, "paused").error or "")


@pytest.mark.parametrize(("request_", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_run_that_is_asked_to_stop_ends_what_it_does(store: Store, request_: Any, status: RunStatus) -> None:
    async def ask_itself(context: ResidentContext) -> dict[str, Any]:
        context.store.runs.request("run", request_)
        return await wait_for_ever(context)

    run = executed(store, ask_itself, status)
    assert (run.request, run.owner) == (None, None)


def test_at_the_end_of_the_server_a_run_goes_back_and_the_next_server_goes_on(store: Store) -> None:
    async def live() -> None:
        store.runs.add("run", "batch", {})
        async with living(store, wait_for_ever):
            await until(lambda: store.runs.get("run").status == "running")
        run = store.runs.get("run")
        assert (run.status, run.attempts, run.owner) == ("queued", 0, None)
        async with living(store, count_up_at_once):
            await until(lambda: store.runs.get("run").status == "succeeded")

    async def count_up_at_once(context: ResidentContext) -> dict[str, Any]:
        return {"attempts": context.run.attempts}

    asyncio.run(live())
    assert store.runs.get("run").result == {"attempts": 1}


def test_after_a_kill_the_next_server_goes_on_from_what_is_done(store: Store) -> None:
    store.runs.add("run", "batch", {})
    spool = store.run_folder("run") / "numbers.txt"
    program = SERVER.format(folder=str(Path(__file__).parent), home=str(store.home))
    with subprocess.Popen([sys.executable, "-c", program]) as server:
        asyncio.run(until(lambda: spool.exists() and len(spool.read_text().split()) > 2))
        server.kill()
    assert store.runs.get("run").status == "running"

    async def live() -> None:
        async with living(store, count_up):
            await until(lambda: store.runs.get("run").status == "succeeded")

    asyncio.run(live())
    assert spool.read_text().split() == [str(number) for number in range(30)]
    assert store.runs.get("run").attempts == 2
    assert "ended early" in store.runs.events("run")[0].message


def test_a_run_that_another_process_took_over_is_left_to_it(store: Store) -> None:
    async def lose(context: ResidentContext) -> dict[str, Any]:
        context.store.runs.claim("host/1/1.00", 600, lambda owner: True, "run")
        await asyncio.sleep(PATIENCE_SECONDS)
        return {}

    async def live() -> None:
        store.runs.add("run", "batch", {})
        async with living(store, lose) as residents:
            await until(lambda: store.runs.get("run").owner == "host/1/1.00")
            await until(lambda: not residents.held)

    asyncio.run(live())
    assert (store.runs.get("run").status, store.runs.get("run").owner) == ("running", "host/1/1.00")


def test_a_busy_service_is_asked_again_and_a_broken_one_not_for_ever(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_context, "FIRST_PAUSE_SECONDS", 0.001)
    statuses = iter([429] * 10 + [503, 200] + [503] * 99)
    asked: list[tuple[str, str, str]] = []

    async def send(caller: Caller, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        asked.append((caller.project, method, path))
        return Answer(next(statuses), body, "req_1")

    async def ask_twice(context: ResidentContext) -> dict[str, Any]:
        first = await context.ask("/v1/embeddings", {"input": "a"})
        second = await context.ask("/v1/models", method="GET")
        return {"statuses": [first.status, second.status], "body": first.body}

    run = executed(store, ask_twice, "succeeded", send=send)
    assert run.result == {"statuses": [200, 503], "body": {"input": "a"}}
    assert asked[:12] == [("default", "POST", "/v1/embeddings")] * 12
    assert len(asked) == 12 + ENGINE_TRIES


def test_all_runs_together_have_so_many_requests_under_way(store: Store) -> None:
    under_way = most = 0

    async def send(caller: Caller, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return Answer(200, None, "req_1")

    async def ask_much(context: ResidentContext) -> dict[str, Any]:
        await asyncio.gather(*(context.ask("/v1/models") for _ in range(20)))
        return {}

    async def live() -> None:
        for number in range(3):
            store.runs.add(f"run-{number}", "batch", {})
        async with living(store, ask_much, send=send, requests_at_once=7):
            await until(lambda: all(run.status == "succeeded" for run in store.runs.all()))

    asyncio.run(live())
    assert most == 7
