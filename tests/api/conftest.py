"""A real service on loopback, in a thread of this process, with real small models, keys, and the SDK's client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from luthier.api.app import create_app
from luthier.api.server import Server, listen
from luthier.api.service import Service
from luthier.records.access import Scope
from luthier.serve.pool import ModelPool
from luthier.store.store import Store
from luthier.workflows.models import pull
from luthier.workflows.serving import model_pool

ALL: tuple[Scope, ...] = ("read", "write", "admin")


class Live:
    """A service that is running. Without a key, its first :meth:`client` of a project makes one."""

    def __init__(self, home: Path, pool: ModelPool | None = None, **options: Any) -> None:
        self.store = Store(home)
        self.service = Service(self.store, pool or model_pool(self.store), **options)
        self.listener = listen("127.0.0.1", 0)
        ready = threading.Event()
        self.server = Server(create_app(self.service), self.listener, lambda _: ready.set())
        self.url = self.server.url
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        assert ready.wait(30)

    def key(self, project: str = "default", *scopes: Scope) -> str:
        """Make a key and return its secret."""
        return self.store.keys.add("test", project, scopes or ALL)[1]

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        """Return a strict client that tries once."""
        settings = {"api_key": api_key, "max_retries": 0, "_strict_response_validation": True} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def close(self) -> None:
        """Stop it, and wait until it is gone."""
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()
        self.store.close()


@pytest.fixture
def start_live(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Give a function that starts a service on a home of its own; all are stopped at the end."""
    started: list[Live] = []

    def start(**options: Any) -> Live:
        started.append(Live(tmp_path / f"home{len(started)}", **options))
        return started[-1]

    yield start
    for live in started:
        live.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path) -> Iterator[Live]:
    """A service for a module's tests, open to everybody, with the bases ``tiny-base`` and ``tiny-encoder``."""
    home = tmp_path_factory.mktemp("live") / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    pull(store, str(tiny_encoder))
    store.close()
    live = Live(home)
    yield live
    live.close()
