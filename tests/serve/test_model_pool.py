from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from luthier.errors import BusyError, CapacityError, EngineError, NotFoundError
from luthier.llm.engine_interface import Engine
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.records.completion import Sampling
from luthier.serve.engine_memory import PROCESS_BYTES, need_of
from luthier.serve.pool import LoadedModel, ModelPool, Resolved, ServedModelInfo


class Shelf:
    """Served model folders by name, and how often each was asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.asked: list[str] = []

    def resolve(self, project: str, name: str) -> Resolved:
        self.asked.append(name)
        if name not in self.folders:
            raise NotFoundError(f"The model {name!r} does not exist.")
        return Resolved(name, self.folders[name])

    def names(self, project: str) -> list[ServedModelInfo]:
        return [ServedModelInfo(name, created=1) for name in self.folders]


@pytest.fixture
def shelf(served_tiny_model: Path, tmp_path: Path) -> Shelf:
    return Shelf({name: Path(shutil.copytree(served_tiny_model, tmp_path / name)) for name in ("a", "b", "c")})


def run(shelf: Shelf, scenario: Callable[[ModelPool], Awaitable[None]], **options: Any) -> None:
    """Run a scenario with a pool, and see that no process is left."""

    async def main() -> None:
        before = {child.pid for child in psutil.Process().children()}
        pool = ModelPool(shelf.resolve, shelf.names, **options)
        try:
            await scenario(pool)
        finally:
            await pool.close()
        assert {child.pid for child in psutil.Process().children()} <= before

    asyncio.run(main())


async def touch(pool: ModelPool, name: str) -> LoadedModel:
    async with pool.lease(name) as leased:
        return shared(pool, leased)


def shared(pool: ModelPool, leased: LoadedModel) -> LoadedModel:
    """Return the model that all requests share, whose engine is metered for each of them."""
    return next(model for model in pool.loaded if model.engine is leased.engine._engine)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def expected_bytes(shelf: Shelf) -> int:
    return need_of(shelf.folders["a"], EngineOptions().cache_gigabytes).expected_bytes


def pids(models: Iterable[LoadedModel]) -> set[int]:
    return {model.engine.pid for model in models}


def test_ten_concurrent_first_requests_load_once(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        loaded = await asyncio.gather(*(touch(pool, "a") for _ in range(10)))
        assert len(pids(loaded)) == 1
        assert len(pool.loaded) == 1

    run(shelf, scenario)


def test_two_names_of_one_folder_share_an_engine_and_a_name_can_be_pointed_elsewhere(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        shelf.folders["alias"] = shelf.folders["a"]
        assert await touch(pool, "alias") is await touch(pool, "a")
        shelf.folders["alias"] = shelf.folders["b"]
        assert await touch(pool, "alias") is await touch(pool, "b")

    run(shelf, scenario)


def test_a_load_does_not_block_a_model_that_runs(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        await touch(pool, "a")
        loading = asyncio.create_task(touch(pool, "b"))
        while "b" not in shelf.asked:
            await asyncio.sleep(0)
        await touch(pool, "a")
        assert not loading.done()
        await loading

    run(shelf, scenario)


def test_what_is_made_on_first_use_is_made_once_and_nobody_else_waits_for_it(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, going, calls = tmp_path / "made", threading.Event(), []

    def make() -> None:
        calls.append(place)
        going.wait(30)
        shutil.copytree(shelf.folders["a"], place)

    def resolve(project: str, name: str) -> Resolved:
        make_it = None if place.is_dir() else make
        return Resolved(name, place, make_it) if name == "new" else Shelf.resolve(shelf, project, name)

    monkeypatch.setattr(shelf, "resolve", resolve)

    async def scenario(pool: ModelPool) -> None:
        many = [asyncio.create_task(touch(pool, "new")) for _ in range(64)]  # more than there are threads
        await until(lambda: bool(calls))
        await touch(pool, "b")
        assert not any(task.done() for task in many)
        going.set()
        assert len(pids(await asyncio.gather(*many))) == 1
        assert len(calls) == 1

    run(shelf, scenario)


def test_what_cannot_be_made_is_an_error_for_all_who_wait_and_tried_again(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def make() -> None:
        calls.append(1)
        raise EngineError("It could not be made.")

    monkeypatch.setattr(shelf, "resolve", lambda _, name: Resolved(name, tmp_path / "made", make))

    async def scenario(pool: ModelPool) -> None:
        for times in (1, 2):
            found = await asyncio.gather(*(touch(pool, "new") for _ in range(4)), return_exceptions=True)
            assert [str(one) for one in found] == ["It could not be made."] * 4
            assert len(calls) == times

    run(shelf, scenario)


def test_models_that_are_loaded_at_once_do_not_hold_more_than_they_may(shelf: Shelf) -> None:
    engines: list[EngineProcess] = []
    beside: list[int] = []

    async def start(folder: Path, options: EngineOptions) -> Engine:
        beside.append(sum(engine.alive for engine in engines))
        engines.append(await EngineProcess.start(folder, options))
        return engines[-1]

    async def scenario(pool: ModelPool) -> None:
        await asyncio.gather(*(touch(pool, name) for name in ("a", "b", "c")))
        assert beside == [0, 0, 0]

    run(shelf, scenario, start=start, memory_bytes=expected_bytes(shelf) + 2**20)  # less than a running engine holds


def test_an_engine_that_died_is_started_again_for_the_next_request(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        first = await touch(pool, "a")
        os.kill(first.engine.pid, signal.SIGKILL)
        while first.engine.alive:
            await asyncio.sleep(0.01)
        second = await touch(pool, "a")
        assert second.engine.pid != first.engine.pid
        assert second.engine.alive

    run(shelf, scenario)


def test_the_least_recently_used_idle_model_makes_room(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        a, b = await touch(pool, "a"), await touch(pool, "b")
        await touch(pool, "a")
        c = await touch(pool, "c")
        assert pids(pool.loaded) == pids([a, c])
        assert not b.engine.alive

    run(shelf, scenario, max_loaded=2)


def test_a_busy_model_is_not_unloaded_and_the_newcomer_waits(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        async with pool.lease("a") as a:
            waiting = asyncio.create_task(touch(pool, "b"))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            assert a.engine.alive
        await waiting
        assert not a.engine.alive

    run(shelf, scenario, max_loaded=1)


def test_waiting_for_room_has_an_end(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        async with pool.lease("a"):
            with pytest.raises(BusyError, match="stayed busy"):
                await touch(pool, "b")
        await touch(pool, "b")

    run(shelf, scenario, max_loaded=1, room_deadline_seconds=0.05)


def test_a_failed_load_fails_all_who_wait_and_is_tried_again(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        weights = shelf.folders["a"] / "model.gguf"
        weights.rename(weights.with_suffix(".away"))
        errors = await asyncio.gather(*(touch(pool, "a") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, NotFoundError) for error in errors)
        weights.with_suffix(".away").rename(weights)
        await touch(pool, "a")

    run(shelf, scenario)


def test_a_requester_that_gives_up_does_not_stop_the_load_for_others(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        first, second = (asyncio.create_task(touch(pool, "a")) for _ in range(2))
        while len(shelf.asked) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        first.cancel()
        assert (await second).engine.alive

    run(shelf, scenario)


def test_closing_in_the_middle_of_a_load_leaves_no_process(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        loading = asyncio.create_task(touch(pool, "a"))
        while not psutil.Process().children():
            await asyncio.sleep(0.01)
        await pool.close()
        with pytest.raises((asyncio.CancelledError, EngineError)):
            await loading
        with pytest.raises(EngineError, match="shutting down"):
            await touch(pool, "b")

    run(shelf, scenario)


def test_an_unknown_name_is_the_resolvers_error(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        with pytest.raises(NotFoundError, match="does not exist"):
            await touch(pool, "z")

    run(shelf, scenario)


def test_models_make_room_by_what_they_are_expected_to_need(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        a, b = await touch(pool, "a"), await touch(pool, "b")
        assert pids(pool.loaded) == pids([b])
        assert not a.engine.alive
        async with pool.lease("b"):
            with pytest.raises(BusyError, match="stayed busy"):
                await touch(pool, "c")
            assert b.engine.alive

    run(shelf, scenario, memory_bytes=expected_bytes(shelf) + 2**20, room_deadline_seconds=0.1)


def test_models_that_run_count_with_what_they_hold(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        models = [await touch(pool, name) for name in ("a", "b", "c")]
        assert pids(pool.loaded) == pids(models)
        assert all(50 * 2**20 < model.engine.memory_bytes < expected_bytes(shelf) / 2 for model in models)

    run(shelf, scenario, memory_bytes=2 * expected_bytes(shelf))


def test_engines_that_have_grown_make_room_the_least_recently_used_first(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        a, b, c = [await touch(pool, name) for name in ("a", "b", "c")]
        await touch(pool, "a")
        async with pool.lease("b"):
            pool._memory_bytes = 1
            await until(lambda: pids(pool.loaded) == pids([b]))
        assert not a.engine.alive
        assert not c.engine.alive

    run(shelf, scenario, sweep_seconds=0.05)


def test_idle_engines_are_unloaded_while_the_machine_is_short_of_memory(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        async with pool.lease("a") as leased:
            a = shared(pool, leased)
            b = await touch(pool, "b")
            await until(lambda: not b.engine.alive)
            assert pids(pool.loaded) == pids([a])
            assert a.engine.alive
        await until(lambda: not pool.loaded)
        assert (await touch(pool, "b")).engine.pid != b.engine.pid

    run(shelf, scenario, least_free_bytes=2**60, sweep_seconds=0.05)


def test_idle_engines_stay_while_there_is_memory(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        a, b = await touch(pool, "a"), await touch(pool, "b")
        shutil.rmtree(shelf.folders["b"])
        await until(lambda: not b.engine.alive)  # the models have been looked at
        assert pids(pool.loaded) == pids([a])
        assert a.engine.alive

    run(shelf, scenario, least_free_bytes=0, sweep_seconds=0.05)


def test_a_model_larger_than_all_engines_may_be_is_refused(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        with pytest.raises(CapacityError, match=r"LUTHIER_ENGINE_MEMORY"):
            await touch(pool, "a")
        assert pool.loaded == []

    run(shelf, scenario, memory_bytes=PROCESS_BYTES)


def test_a_model_whose_files_are_deleted_is_unloaded_after_its_last_answer(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        b = await touch(pool, "b")
        async with pool.lease("a") as a:
            shutil.rmtree(shelf.folders.pop("a"))
            with pytest.raises(NotFoundError):
                await touch(pool, "a")
            await asyncio.sleep(0.2)
            assert [d async for d in a.engine.generate([1, 2, 3], Sampling(max_tokens=3), ())]
        await until(lambda: pids(pool.loaded) == pids([b]))
        assert not a.engine.alive

    run(shelf, scenario, sweep_seconds=0.05)


def test_others_answer_while_a_slow_load_is_under_way_and_all_who_wait_for_it_get_it(shelf: Shelf) -> None:
    may_start = asyncio.Event()
    slow = shelf.folders["b"]

    async def start(folder: Path, options: EngineOptions) -> Engine:
        if folder == slow:
            await may_start.wait()
        return await EngineProcess.start(folder, options)

    async def scenario(pool: ModelPool) -> None:
        waiting = [asyncio.create_task(touch(pool, "b")) for _ in range(10)]
        await until(lambda: shelf.asked.count("b") == 10)
        for name in ("a", "c", "a"):
            async with pool.lease(name) as loaded:
                assert [d async for d in loaded.engine.generate([1, 2, 3], Sampling(max_tokens=3), ())]
        assert not any(task.done() for task in waiting)
        may_start.set()
        assert len(pids(await asyncio.gather(*waiting))) == 1

    run(shelf, scenario, start=start)


def test_requests_that_give_up_while_they_wait_leave_the_model_free_to_go(shelf: Shelf) -> None:
    async def scenario(pool: ModelPool) -> None:
        waiting = [asyncio.create_task(touch(pool, "a")) for _ in range(3)]
        await until(lambda: len(shelf.asked) == 3)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await touch(pool, "b")
        assert len(pool.loaded) == 1

    run(shelf, scenario, max_loaded=1)
