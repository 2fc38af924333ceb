"""A server that speaks OpenAI's API, and vLLM's run-time loading of adapters, whoever started it.

The routes and error shapes are those of vLLM 0.10.2 and later (``return_token_ids`` came with its pull request 22587;
``/v1/load_lora_adapter`` is described in its ``docs/features/lora.md``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from luthier.errors import BusyError, EngineError, InputError, NotFoundError
from luthier.llm.server_process import ServerProcess

CONNECT_SECONDS = 10.0
READ_SECONDS = 600.0
POLL_SECONDS = 0.1
REFUSED_STATUSES = frozenset({400, 422})
MAX_MESSAGE_CHARACTERS = 500
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
ADAPTER_HINT = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


class ServedModel(NamedTuple):
    """A model as a server lists it: the folder that it came from, and how many tokens it takes, where it says so."""

    root: str | None
    context_length: int | None


class EngineServer:
    """A running server.

    Args:
        url: Its address, without ``/v1``.
        api_key: Sent as a bearer token; None where it needs none.
        process: The process, where we started it.
    """

    def __init__(self, url: str, api_key: str | None = None, process: ServerProcess | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._process = process
        self._lost = False
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            trust_env=httpx.URL(self.url).host not in LOOPBACK,  # a proxy has no way back to this machine
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    @property
    def alive(self) -> bool:
        """Whether the server was there when it was last spoken to."""
        return not self._lost and (self._process is None or self._process.alive)

    @property
    def memory_bytes(self) -> int:
        """The resident memory of the server's processes; 0 for one that others started."""
        return self._process.memory_bytes if self._process is not None else 0

    async def wait_ready(self, deadline_seconds: float) -> None:
        """Wait until ``/health`` says that requests are answered.

        Raises:
            EngineError: the server ended, or is not ready in time.
        """
        try:
            async with asyncio.timeout(deadline_seconds):
                while not await self._healthy():
                    if self._process is not None and not self._process.alive:
                        raise await self._process.died()
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            self._lost = True
            raise EngineError(
                f"The model server {self.url} was not ready within {deadline_seconds:g} seconds."
            ) from None

    async def models(self) -> dict[str, ServedModel]:
        """Return the models that the server has, by their ids.

        Raises:
            EngineError: the server does not tell.
        """
        response = await self._ask("GET", "/v1/models")
        try:
            cards = response.json()["data"]
            return {card["id"]: ServedModel(card.get("root"), card.get("max_model_len")) for card in cards}
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{response.url} does not answer as OpenAI's API does ({error!r}).") from error

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Have the server load an adapter under a name; one that is loaded from another folder is replaced.

        Raises:
            EngineError: the server cannot load it, or loads none at run time.
        """
        loaded = await self.models()
        if name in loaded and loaded[name].root == str(folder):
            return
        if name in loaded:
            await self.unload_adapter(name)
        try:
            await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except NotFoundError as error:
            message = f"{self.url} cannot load the adapter {name}: {error.message}"
            raise EngineError(message, hint=ADAPTER_HINT) from error
        except EngineError as error:
            if "already been loaded" not in error.message:  # by another request, in the meantime
                raise

    async def unload_adapter(self, name: str) -> None:
        """Have the server forget an adapter.

        Raises:
            EngineError: the server refuses.
            NotFoundError: it does not know the adapter.
        """
        await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    @asynccontextmanager
    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[httpx.Response, None]:
        """Ask for a streamed completion; leaving the context closes the connection, which ends the answer.

        Raises:
            BusyError: the server has no room for a further request.
            InputError: the server cannot answer such a request.
            NotFoundError: the server does not have the model.
            EngineError: it refuses the request, or cannot be reached.
        """
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code in REFUSED_STATUSES:
                    raise InputError(f"The model's server refused: {error_message(await response.aread())}")
                await _raise_for_status(response)
                yield response
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    async def close(self) -> None:
        """Close all connections, and end the server where we started it."""
        self._lost = True
        await self._client.aclose()
        if self._process is not None:
            await self._process.close()

    async def _healthy(self) -> bool:
        try:
            response = await self._client.get("/health", timeout=CONNECT_SECONDS)
        except httpx.TransportError:
            return False
        return response.status_code < httpx.codes.INTERNAL_SERVER_ERROR  # not every server has the route

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        await _raise_for_status(response)
        return response

    def _unreachable(self, error: httpx.TransportError) -> EngineError:
        self._lost = self._lost or isinstance(error, httpx.ConnectError)
        return EngineError(f"The model server {self.url} cannot be reached: {error!r}")


async def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    message = f"{response.url} answered {response.status_code}: {error_message(await response.aread())}"
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise BusyError(message)
    if response.status_code == httpx.codes.NOT_FOUND:
        raise NotFoundError(message)
    raise EngineError(message)


def error_message(content: bytes | str) -> str:
    """Return the message of an error body: ``{"error": {"message": …}}``, or ``{"message": …}`` of older vLLMs."""
    text = content if isinstance(content, str) else content.decode("utf-8", "replace")
    try:
        body = httpx.Response(200, text=text).json()
    except ValueError:
        return text[:MAX_MESSAGE_CHARACTERS]
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:MAX_MESSAGE_CHARACTERS]
