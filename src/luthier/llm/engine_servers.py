"""Which server runs which model: one per installation by its address, or one per weights that we start and end."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from luthier.errors import BusyError, EngineError, NotFoundError
from luthier.llm.engine_server import EngineServer, ServedModel
from luthier.llm.remote_engine import RemoteEngine
from luthier.llm.server_process import ServerProcess

READY_SECONDS = 900.0  # a large model is read from a slow disk, and compiled for
ADDRESS_READY_SECONDS = 10.0
ADAPTERS_FLAG = "--enable-lora"


@dataclass(frozen=True)
class Servable:
    """What a server needs to know of a model.

    ``name`` is the model's own name. ``weights`` is a folder of safetensors: the model's, or its base's where
    ``adapter`` makes the difference. ``weights_names`` are the names under which a server may have those weights.
    ``gguf`` is the model's own GGUF file.
    """

    name: str
    weights: Path
    weights_names: tuple[str, ...]
    adapter: Path | None = None
    gguf: Path | None = None


@dataclass(frozen=True)
class _Ready:
    """A server that answers, its name of the weights, and how many tokens it takes with them."""

    server: EngineServer
    weights_name: str
    context_length: int | None


@dataclass
class _Shared:
    """A server that is starting or running, and how many engines use it."""

    starting: asyncio.Task[_Ready]
    engines: int = 0

    @property
    def broken(self) -> bool:
        if not self.starting.done():
            return False
        failed = self.starting.cancelled() or self.starting.exception() is not None
        return failed or not self.starting.result().server.alive


@dataclass
class EngineServers:
    """The servers of an installation. Everything but the constructor belongs to one event loop.

    ``engine`` is an address (``http://host:port``) or a command such as ``vllm serve {folder} --port {port}
    --enable-lora``. In a command, ``{folder}`` is the folder of the weights, ``{gguf}`` the GGUF file of a model (which
    then has a server of its own), ``{name}`` its name and ``{port}`` the port to listen on.
    """

    engine: str
    api_key: str | None = None
    ready_seconds: float = READY_SECONDS
    _servers: dict[str, _Shared] = field(default_factory=dict)

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters are loaded into the server of their base."""
        return self._is_address or ADAPTERS_FLAG in self.engine

    @property
    def takes_gguf(self) -> bool:
        """Whether each model is served from its own GGUF file."""
        return "{gguf}" in self.engine

    async def start(self, model: Servable) -> RemoteEngine:
        """Return a model as an engine; its server is started, or found, and loads the model's adapter.

        Raises:
            EngineError: the server does not start, cannot be reached, or does not have the model.
        """
        key = str(model.gguf if self.takes_gguf else model.weights)
        shared = self._servers.get(key)
        if shared is None or shared.broken:
            shared = self._servers[key] = _Shared(asyncio.create_task(self._open(model)))
        shared.engines += 1
        try:
            ready = await asyncio.shield(shared.starting)
            return await self._engine(model, key, shared, ready)
        except BaseException:
            await self._release(key, shared)
            raise

    async def _engine(self, model: Servable, key: str, shared: _Shared, ready: _Ready) -> RemoteEngine:
        async def close() -> None:
            try:
                outlives = self._is_address or shared.engines > 1
                if model.adapter is not None and outlives and ready.server.alive:
                    with contextlib.suppress(NotFoundError, EngineError, BusyError):  # gone already, or will be
                        await ready.server.unload_adapter(model.name)
            finally:
                await self._release(key, shared)

        def share() -> int:
            return max(shared.engines, 1)

        engine = partial(RemoteEngine, ready.server, on_close=close, share=share, context_length=ready.context_length)
        adapter = model.adapter
        if adapter is None:
            return engine(ready.weights_name, is_llama_cpp=self.takes_gguf)
        await ready.server.load_adapter(model.name, adapter)
        return engine(model.name, load=partial(ready.server.load_adapter, model.name, adapter))

    async def _open(self, model: Servable) -> _Ready:
        process = None if self._is_address else await self._start_process(model)
        server = EngineServer(self.engine if process is None else process.url, self.api_key, process)
        try:
            limit = self.ready_seconds if process else min(self.ready_seconds, ADDRESS_READY_SECONDS)
            await server.wait_ready(limit)
            models = await server.models()
            name = next(iter(models)) if process else _name_of(model, server.url, models)
            return _Ready(server, name, models[name].context_length)
        except BaseException:
            await server.close()
            raise

    async def _start_process(self, model: Servable) -> ServerProcess:
        values = {"folder": str(model.weights), "gguf": str(model.gguf), "name": model.name}
        return await ServerProcess.start(self.engine, values)

    async def _release(self, key: str, shared: _Shared) -> None:
        shared.engines -= 1
        if shared.engines > 0:
            return
        if self._servers.get(key) is shared:
            del self._servers[key]
        shared.starting.cancel()  # a start under way; one that is done stays as it is
        await asyncio.wait([shared.starting])
        if not shared.starting.cancelled() and shared.starting.exception() is None:
            await shared.starting.result().server.close()

    @property
    def _is_address(self) -> bool:
        return self.engine.startswith(("http://", "https://"))


def _name_of(model: Servable, url: str, models: dict[str, ServedModel]) -> str:
    """Return the name under which a server has a model's weights."""
    known = {*model.weights_names, str(model.weights)}
    name = next((name for name, served in models.items() if name in known or served.root in known), None)
    if name is None:
        raise EngineError(
            f"The model server {url} has {', '.join(models) or 'no model'}, and not {model.weights_names[0]}.",
            hint=f"start it with --served-model-name {model.weights_names[0]}",
        )
    return name
