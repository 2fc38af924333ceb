"""The models that are running: loaded on first use, shared by all requests, unloaded when others need the room."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from luthier.errors import BusyError, CapacityError, EngineError, InputError, NotFoundError
from luthier.llm.embedding_format import EmbeddingFormat
from luthier.llm.encoder_process import EncoderProcess
from luthier.llm.engine_interface import Encoder, Engine
from luthier.llm.engine_process import EngineOptions, EngineProcess
from luthier.llm.machine_memory import machine_memory
from luthier.records.access import DEFAULT_PROJECT
from luthier.serve.deadline import Deadline, RequestLimits
from luthier.serve.engine_memory import GIGABYTE, MemoryNeed, default_budget, encoder_need, least_free, need_of
from luthier.serve.metering import MeteredEncoder, MeteredEngine, ModelMetrics
from luthier.templates.chat_format import ChatFormat

MAX_LOADED = 8
ROOM_DEADLINE_SECONDS = 60.0
SWEEP_SECONDS = 2.0
StartEngine = Callable[[Path, EngineOptions], Awaitable[Engine]]


@dataclass(frozen=True)
class Resolved:
    """The model that a name means. Names of one folder share an engine.

    Attributes:
        name: The model's own name.
        folder: What is served, with its chat format.
        make: Makes the folder where it is not there yet; called in a thread, one at a time.
        chat_folder: Where the chat format is, if that is not the folder.
    """

    name: str
    folder: Path
    make: Callable[[], object] | None = None
    chat_folder: Path | None = None


Resolve = Callable[[str, str], Resolved]


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

    engine: Engine
    chat_format: ChatFormat


@dataclass(frozen=True)
class LoadedEncoder:
    """A running encoder and how its model reads a text."""

    engine: Encoder
    embedding_format: EmbeddingFormat


Loaded = TypeVar("Loaded", LoadedModel, LoadedEncoder)
Load = Callable[[Resolved], Awaitable[Loaded]]


def _no_encoder(project: str, name: str) -> Resolved:
    raise NotFoundError(f"The model {name!r} does not exist.")


@dataclass(frozen=True)
class EngineInfo:
    """What a running engine holds and does. ``model`` is the name by which it was asked last."""

    model: str
    memory_bytes: int
    in_flight: int


class _Slot:
    """One folder that is loaded or being loaded, and how many answers it is held for."""

    def __init__(self, loading: asyncio.Task[LoadedModel | LoadedEncoder]) -> None:
        self.loading = loading
        self.need = MemoryNeed(0, 0)  # until it is known
        self.users = 0
        self.last_used = 0
        self.name = ""  # by which it was asked last

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

    @property
    def held_bytes(self) -> int:
        """What a running engine holds, measured, or what one that is loading will; 0 for one that runs elsewhere."""
        if self.broken or not self.need.expected_bytes:
            return 0
        return self.loading.result().engine.memory_bytes if self.loading.done() else self.need.expected_bytes


class ModelPool:
    """Running models by name. Everything but the constructor belongs to one event loop.

    Args:
        resolve: Returns the model that (project, name) means, or raises NotFoundError. It is asked for every request,
            in a worker thread, so that an alias can be pointed elsewhere at any time.
        names: Returns the models that a project may list.
        resolve_encoder: As ``resolve``, for models that read: the folder is that of an encoder's weights.
        max_loaded: How many engines may run at once; the least recently used idle one makes room.
        memory_bytes: How much memory all engines together may hold; None takes a share of the machine's. Idle engines
            make room for one that is to be loaded, and when those that run have grown beyond it.
        least_free_bytes: Idle engines are also unloaded while the machine has less free memory; None takes a share.
        options: How to run an engine.
        start: Starts an engine on a folder; None takes a process of this machine. A folder without ``model.gguf`` is
            run elsewhere, with a memory of its own, and only ``max_loaded`` bounds it.
        room_deadline_seconds: How long a request waits for room when all engines are busy.
        sweep_seconds: How often deleted models and grown engines are looked for.
        limits: How many answers one engine is asked for at once, and how long a request may take.
    """

    def __init__(
        self,
        resolve: Resolve,
        names: Callable[[str], list[ServedModelInfo]],
        *,
        resolve_encoder: Resolve = _no_encoder,
        max_loaded: int = MAX_LOADED,
        memory_bytes: int | None = None,
        least_free_bytes: int | None = None,
        options: EngineOptions | None = None,
        start: StartEngine | None = None,
        room_deadline_seconds: float = ROOM_DEADLINE_SECONDS,
        sweep_seconds: float = SWEEP_SECONDS,
        limits: RequestLimits | None = None,
    ) -> None:
        self._resolve = resolve
        self._resolve_encoder = resolve_encoder
        self._limits = limits or RequestLimits()
        self._names = names
        self._max_loaded = max_loaded
        self._memory_bytes = default_budget() if memory_bytes is None else memory_bytes
        self._least_free_bytes = least_free() if least_free_bytes is None else least_free_bytes
        self._options = options or EngineOptions()
        self._start: StartEngine = start or EngineProcess.start
        self._room_deadline_seconds = room_deadline_seconds
        self._sweep_seconds = sweep_seconds
        self._sweeping: asyncio.Task[None] | None = None
        self._slots: dict[Path, _Slot] = {}
        self._closing: list[_Slot] = []
        self._clock = itertools.count(1)
        self._released = asyncio.Event()
        self._closed = False
        self._maker = ThreadPoolExecutor(1, "make")  # each holds a whole model in memory
        self.metrics = ModelMetrics()

    def models(self, project: str = DEFAULT_PROJECT) -> list[ServedModelInfo]:
        """Return the models that a project may list."""
        return self._names(project)

    def meant(self, name: str, project: str = DEFAULT_PROJECT) -> str:
        """Return the own name of the model that a name means: one that writes, or reads.

        Raises:
            NotFoundError: no such model.
        """
        try:
            return self.writer(name, project)
        except InputError:
            return self._resolve_encoder(project, name).name

    def writer(self, name: str, project: str = DEFAULT_PROJECT) -> str:
        """Return the own name of the model that a name means, which :meth:`lease` would load.

        Raises:
            NotFoundError: no such model.
            InputError: the model does not write.
        """
        return self._resolve(project, name).name

    @property
    def loaded(self) -> list[LoadedModel]:
        """The models that write and are running now."""
        return [loaded for loaded in self._running() if isinstance(loaded, LoadedModel)]

    @property
    def loaded_encoders(self) -> list[LoadedEncoder]:
        """The models that read and are running now."""
        return [loaded for loaded in self._running() if isinstance(loaded, LoadedEncoder)]

    @property
    def engines(self) -> list[EngineInfo]:
        """What the engines that are running hold and do."""
        slots = [slot for slot in self._slots.values() if slot.loading.done() and not slot.broken]
        running = [(slot.name, slot.loading.result().engine) for slot in slots]
        return [EngineInfo(name, engine.memory_bytes, engine.in_flight) for name, engine in running]

    @contextlib.asynccontextmanager
    async def lease(self, name: str, project: str = DEFAULT_PROJECT, answers: int = 1) -> AsyncIterator[LoadedModel]:
        """Hold a model of a project for a request; it is loaded if need be, and is not unloaded before the end.

        Args:
            name: What the request calls it.
            project: Whose request it is.
            answers: How many the engine is asked for.

        Raises:
            NotFoundError: no such model.
            InputError: the model does not write.
            EngineError: the model cannot be loaded.
            CapacityError: the model is larger than all engines may be.
            BusyError: all engines stayed busy until the deadline.
            ApiError: 429, where the model is asked for as much as it takes; 504, where it was not loaded in time.
        """
        resolved = await asyncio.to_thread(self._resolve, project, name)
        deadline = Deadline(self._limits.seconds)
        async with self._hold(resolved, answers, self._load_model, deadline) as loaded:
            yield replace(loaded, engine=MeteredEngine(loaded.engine, resolved.name, self.metrics, deadline))

    @contextlib.asynccontextmanager
    async def lease_encoder(self, name: str, project: str = DEFAULT_PROJECT) -> AsyncIterator[LoadedEncoder]:
        """Hold an encoder for one request, as :meth:`lease` holds a model that writes.

        Raises:
            NotFoundError: no such model.
            InputError: the model is no encoder.
            EngineError: the model cannot be loaded.
            CapacityError: the model is larger than all engines may be.
            BusyError: all engines stayed busy until the deadline.
            ApiError: 429, where the model is asked for as much as it takes; 504, where it was not loaded in time.
        """
        resolved = await asyncio.to_thread(self._resolve_encoder, project, name)
        deadline = Deadline(self._limits.seconds)
        async with self._hold(resolved, 1, self._load_encoder, deadline) as loaded:
            yield replace(loaded, engine=MeteredEncoder(loaded.engine, resolved.name, self.metrics, deadline))

    async def close(self) -> None:
        """End all engines; requests in flight fail."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        self._maker.shutdown(wait=False, cancel_futures=True)
        slots, self._slots = list(self._slots.values()), {}
        await asyncio.gather(*(_unload(slot) for slot in slots))

    @contextlib.asynccontextmanager
    async def _hold(
        self, resolved: Resolved, answers: int, load: Load[Loaded], deadline: Deadline
    ) -> AsyncIterator[Loaded]:
        slot = self._slot(resolved, load)
        self._limits.check(slot.users, resolved.name)
        slot.users += answers
        slot.name = resolved.name
        try:
            with self.metrics.wait_for(resolved.name):
                async with deadline.within():
                    loaded = await asyncio.shield(slot.loading)
            yield cast("Loaded", loaded)
        finally:
            slot.users -= answers
            slot.last_used = next(self._clock)
            self._released.set()

    def _slot(self, resolved: Resolved, load: Load[Loaded]) -> _Slot:
        if self._closed:
            raise EngineError("The server is shutting down.")
        slot = self._slots.get(resolved.folder)
        if slot is None or slot.broken:
            replaced = self._slots.pop(resolved.folder, None)  # the new one takes its place behind those that run
            loading = asyncio.create_task(self._load(resolved, replaced, load))
            slot = self._slots[resolved.folder] = _Slot(loading)
            self._sweeping = self._sweeping or asyncio.create_task(self._sweep())
        return slot

    async def _load(
        self, resolved: Resolved, replaced: _Slot | None, load: Load[Loaded]
    ) -> LoadedModel | LoadedEncoder:
        if replaced is not None:
            await _unload(replaced)
        if resolved.make is not None:
            await asyncio.get_running_loop().run_in_executor(self._maker, resolved.make)
        return await load(resolved)

    async def _load_model(self, resolved: Resolved) -> LoadedModel:
        chat_format = await asyncio.to_thread(ChatFormat.load, resolved.chat_folder or resolved.folder)
        await self._make_room(resolved.folder, need_of(resolved.folder, self._options.cache_gigabytes))
        engine = await self._start(resolved.folder, self._options)
        context = min(filter(None, (engine.context_length, chat_format.context_length)))
        return LoadedModel(engine, replace(chat_format, context_length=context))

    async def _load_encoder(self, resolved: Resolved) -> LoadedEncoder:
        embedding_format = await asyncio.to_thread(EmbeddingFormat.load, resolved.folder)
        await self._make_room(resolved.folder, encoder_need(resolved.folder))
        return LoadedEncoder(await EncoderProcess.start(resolved.folder, self._options.threads), embedding_format)

    def _running(self) -> list[LoadedModel | LoadedEncoder]:
        slots = [slot for slot in self._slots.values() if slot.loading.done() and not slot.broken]
        return [slot.loading.result() for slot in slots]

    async def _make_room(self, folder: Path, need: MemoryNeed) -> None:
        """Unload idle models until this one is within the limits, waiting for busy ones to become idle."""
        if need.least_bytes > self._memory_bytes:
            raise CapacityError(
                f"The model in {folder.name} needs {need.least_bytes / GIGABYTE:.1f} GiB, and engines may hold "
                f"{self._memory_bytes / GIGABYTE:.1f} GiB in all.",
                hint="let engines hold more: LUTHIER_ENGINE_MEMORY",
            )
        # Behind those whose need was known before: they have counted without this one.
        self._slots[folder] = slot = self._slots.pop(folder)
        slot.need = need
        self._released.set()
        deadline = asyncio.get_running_loop().time() + self._room_deadline_seconds
        while not self._has_room(folder):
            self._released.clear()
            if await self._unload_idle():
                continue
            try:
                async with asyncio.timeout_at(deadline):
                    await self._released.wait()
            except TimeoutError:
                raise BusyError(
                    f"The models that run ({self._max_loaded} at most, {self._memory_bytes / GIGABYTE:.1f} GiB) stayed "
                    f"busy for {self._room_deadline_seconds:g} seconds.",
                    hint="try again, or let engines hold more: LUTHIER_ENGINE_MEMORY, LUTHIER_MAX_LOADED",
                ) from None

    def _has_room(self, folder: Path) -> bool:
        """Return whether a folder fits beside those that come before it. Alone, it always does."""
        earlier = [self._slots[other] for other in itertools.takewhile(lambda other: other != folder, self._slots)]
        sound = [slot for slot in earlier if not slot.broken] + self._closing
        if not sound:
            return True
        held = sum(slot.held_bytes for slot in sound) + self._slots[folder].need.expected_bytes
        return len(sound) < self._max_loaded and held <= self._memory_bytes

    async def _unload_idle(self, *, held: bool = False) -> bool:
        """Unload the least recently used idle model (``held``: that holds memory); return whether there was one."""
        idle = [folder for folder, slot in self._slots.items() if slot.idle and (slot.held_bytes or not held)]
        if not idle:
            return False
        oldest = min(idle, key=lambda folder: self._slots[folder].last_used)
        slot = self._slots.pop(oldest)
        self._closing.append(slot)  # it holds what it holds until it is gone
        try:
            await _unload(slot)
        finally:
            self._closing.remove(slot)
            self._released.set()
        return True

    async def _sweep(self) -> None:
        """Unload idle models without files, and the oldest idle ones while all hold too much or memory is short."""
        while True:
            await asyncio.sleep(self._sweep_seconds)
            gone = await asyncio.to_thread(_missing, list(self._slots))
            for folder in gone:
                if folder in self._slots and self._slots[folder].idle:
                    await _unload(self._slots.pop(folder))
            while len(self._slots) > 1 and self._held_bytes > self._memory_bytes and await self._unload_idle():
                pass
            while await asyncio.to_thread(self._is_short_of_memory) and await self._unload_idle(held=True):
                pass
            self._released.set()

    def _is_short_of_memory(self) -> bool:
        return machine_memory().free_bytes < self._least_free_bytes

    @property
    def _held_bytes(self) -> int:
        return sum(slot.held_bytes for slot in self._slots.values())


def _missing(folders: list[Path]) -> list[Path]:
    return [folder for folder in folders if not folder.is_dir()]


async def _unload(slot: _Slot) -> None:
    slot.loading.cancel()  # a load under way; one that is done stays as it is
    await asyncio.wait([slot.loading])
    if not slot.loading.cancelled() and slot.loading.exception() is None:
        await slot.loading.result().engine.close()
