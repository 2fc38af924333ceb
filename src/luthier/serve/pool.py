"""The models that are running: loaded on first use, shared by all requests, unloaded when others need the room."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import CapacityError, EngineError
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.records.access import DEFAULT_PROJECT
from luthier.templates.chat_format import ChatFormat

ROOM_DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class ServedModelInfo:
    """What a list of models says of one. ``created`` is in Unix seconds; ``root`` names the base model."""

    name: str
    created: int
    owned_by: str = "luthier"
    root: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A running engine and how its model writes a conversation."""

    engine: EngineProcess
    chat_format: ChatFormat


class _Slot:
    """One folder that is loaded or being loaded, and how many requests hold it."""

    def __init__(self, loading: asyncio.Task[LoadedModel]) -> None:
        self.loading = loading
        self.users = 0
        self.last_used = 0

    @property
    def broken(self) -> bool:
        if not self.loading.done():
            return False
        return (
            self.loading.cancelled() or self.loading.exception() is not None or not self.loading.result().engine.alive
        )

    @property
    def idle(self) -> bool:
        return self.users == 0 and self.loading.done()


class ModelPool:
    """Running models by name. Everything but the constructor belongs to one event loop.

    Args:
        resolve: Returns the served model folder of (project, name), or raises NotFoundError. It is asked for every
            request, in a worker thread, so that an alias can be pointed elsewhere at any time. Names of one folder
            share an engine.
        names: Returns the models that a project may list.
        max_loaded: How many engines may run at once; the least recently used idle one makes room.
        options: How to run an engine.
        room_deadline_seconds: How long a request waits for room when all engines are busy.
    """

    def __init__(
        self,
        resolve: Callable[[str, str], Path],
        names: Callable[[str], list[ServedModelInfo]],
        *,
        max_loaded: int = 2,
        options: EngineOptions | None = None,
        room_deadline_seconds: float = ROOM_DEADLINE_SECONDS,
    ) -> None:
        self._resolve = resolve
        self._names = names
        self._max_loaded = max_loaded
        self._options = options or EngineOptions()
        self._room_deadline_seconds = room_deadline_seconds
        self._slots: dict[Path, _Slot] = {}
        self._clock = itertools.count(1)
        self._released = asyncio.Event()
        self._closed = False

    def models(self, project: str = DEFAULT_PROJECT) -> list[ServedModelInfo]:
        """Return the models that a project may list."""
        return self._names(project)

    @property
    def loaded(self) -> list[LoadedModel]:
        """The models that are running now."""
        slots = [slot for slot in self._slots.values() if slot.loading.done() and not slot.broken]
        return [slot.loading.result() for slot in slots]

    @contextlib.asynccontextmanager
    async def lease(self, name: str, project: str = DEFAULT_PROJECT) -> AsyncIterator[LoadedModel]:
        """Hold a model of a project for one request; it is loaded if need be, and is not unloaded before the end.

        Raises:
            NotFoundError: no such model.
            EngineError: the model cannot be loaded.
            CapacityError: all engines stayed busy until the deadline.
        """
        folder = await asyncio.to_thread(self._resolve, project, name)
        slot = self._slot(folder)
        slot.users += 1
        try:
            yield await asyncio.shield(slot.loading)
        finally:
            slot.users -= 1
            slot.last_used = next(self._clock)
            self._released.set()

    async def close(self) -> None:
        """End all engines; requests in flight fail."""
        self._closed = True
        slots, self._slots = list(self._slots.values()), {}
        await asyncio.gather(*(_unload(slot) for slot in slots))

    def _slot(self, folder: Path) -> _Slot:
        if self._closed:
            raise EngineError("The server is shutting down.")
        slot = self._slots.get(folder)
        if slot is None or slot.broken:
            slot = self._slots[folder] = _Slot(asyncio.create_task(self._load(folder, replaced=slot)))
        return slot

    async def _load(self, folder: Path, replaced: _Slot | None) -> LoadedModel:
        if replaced is not None:
            await _unload(replaced)
        chat_format = await asyncio.to_thread(ChatFormat.load, folder)
        await self._make_room(folder)
        return LoadedModel(await EngineProcess.start(folder, self._options), chat_format)

    async def _make_room(self, folder: Path) -> None:
        """Unload idle models until this one is within the limit, waiting for busy ones to become idle."""
        try:
            async with asyncio.timeout(self._room_deadline_seconds):
                while self._rank(folder) >= self._max_loaded:
                    self._released.clear()
                    if not await self._unload_idle():
                        await self._released.wait()
        except TimeoutError:
            raise CapacityError(
                f"All {self._max_loaded} models that may run at once stayed busy for {self._room_deadline_seconds:g} "
                "seconds.",
                hint="try again, or let more models run at once",
            ) from None

    def _rank(self, folder: Path) -> int:
        """Return how many sound slots were opened before this folder's."""
        earlier = itertools.takewhile(lambda other: other != folder, self._slots)
        return sum(not self._slots[other].broken for other in earlier)

    async def _unload_idle(self) -> bool:
        idle = [folder for folder, slot in self._slots.items() if slot.idle]
        if not idle:
            return False
        oldest = min(idle, key=lambda folder: self._slots[folder].last_used)
        await _unload(self._slots.pop(oldest))
        return True


async def _unload(slot: _Slot) -> None:
    slot.loading.cancel()  # a load under way; one that is done stays as it is
    with contextlib.suppress(asyncio.CancelledError, Exception):
        loaded = await slot.loading
        await loaded.engine.close()
