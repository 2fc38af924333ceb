"""Something on the loopback that webhooks, or traces, are sent to."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DEADLINE_SECONDS = 60


@dataclass
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """A server that answers with the given statuses, one after the other, and with the last one from then on.

    While ``hold`` is cleared, it does not answer.
    """

    statuses: list[int] = field(default_factory=lambda: [200])
    location: str | None = None
    port: int = 0
    received: list[Received] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Receiver:
        receiver = self
        self.hold.set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.received.append(Received(self.path, headers, body))
                receiver.hold.wait(DEADLINE_SECONDS)
                statuses = receiver.statuses
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                if receiver.location:
                    self.send_header("location", receiver.location)
                self.send_header("content-length", "0")
                with suppress(ConnectionError):  # who asked may be gone
                    self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def wait(self, count: int) -> list[Received]:
        """Wait until so many requests came, and return them."""
        end = time.monotonic() + DEADLINE_SECONDS
        while len(self.received) < count:
            assert time.monotonic() < end, self.received
            time.sleep(0.02)
        return self.received
