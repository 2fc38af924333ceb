"""The client: ``python -m serving.load SPEC.json RESULT.json`` asks a server with many connections at once.

It shares the processor with the server, so it is lean: one thread, one epoll, raw sockets; of an event it looks at no
more than it must. A spec has the ``url`` (host and port), how many ``clients``, and the ``bodies`` of the requests,
which the clients take in turn. The result has for every request when it was sent, when each piece of text came, and its
usage.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

END_OF_EVENT = b"\n\n"
END_OF_ANSWER = b"\r\n0\r\n\r\n"
DEADLINE_SECONDS = 900.0


class Client:
    """One connection, which asks one question after the other."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._address = (host, port)
        self._head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n".encode()
        self._rest = self._request = b""
        self.socket = self._connect()
        self.answer: dict[str, Any] = {}

    def ask(self, body: bytes) -> None:
        """Send a request."""
        self._rest = b""
        self.answer = {"sent": time.perf_counter(), "pieces": [], "usage": None}
        self._request = self._head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            self.socket.sendall(self._request)
        except ConnectionError:
            self.reconnect()

    def read(self) -> bool:
        """Take what has come; return whether the answer is complete.

        Raises:
            ConnectionResetError: the server has closed the connection after the last answer.
        """
        new = self.socket.recv(2**18)
        now = time.perf_counter()
        if not new and not self._rest and not self.answer["pieces"]:
            raise ConnectionResetError
        if not new:
            raise SystemExit(f"the server closed the connection: {self._rest[-500:]!r}")
        if not self.answer["pieces"] and new.startswith(b"HTTP/1.1 ") and not new.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server refused: {new[:1000]!r}")
        *events, self._rest = (self._rest + new).split(END_OF_EVENT)
        for event in events:
            self._take(event, now)
        return self._rest.endswith(END_OF_ANSWER)

    def reconnect(self) -> None:
        """Open the connection again and repeat the request, where a server closes it after an answer."""
        self.socket.close()
        self.socket = self._connect()
        self.socket.sendall(self._request)

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _take(self, event: bytes, now: float) -> None:
        if b'"content":"' in event and b'"content":""' not in event:
            self.answer["pieces"].append(now)
        if b'"completion_tokens":' in event:
            self.answer["usage"] = json.loads(event[event.index(b"data: ") + 6 :])["usage"]
        if b'"error":' in event:
            raise SystemExit(f"the server failed: {event[-1000:]!r}")


class Load:
    """All clients, and the questions that they still have to ask."""

    def __init__(self, url: str, path: str, bodies: list[bytes]) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._server = (host, int(port), path)
        self._waiting = iter(bodies)
        self._events = select.epoll()
        self._clients: dict[int, Client] = {}
        self.answers: list[dict[str, Any]] = []

    def run(self, clients: int) -> None:
        """Ask all questions with so many clients at once."""
        for _ in range(clients):
            self._next(Client(*self._server))
        while self._clients:
            ready = self._events.poll(DEADLINE_SECONDS)
            if not ready:
                raise SystemExit(f"nothing came for {DEADLINE_SECONDS:g} seconds")
            for number, _ in ready:
                self._read(self._clients[number])

    def _read(self, client: Client) -> None:
        try:
            done = client.read()
        except ConnectionError:
            self._forget(client)
            client.reconnect()
            self._watch(client)
            return
        if done:
            self.answers.append(client.answer | {"ended": time.perf_counter()})
            self._forget(client)
            self._next(client)

    def _next(self, client: Client) -> None:
        body = next(self._waiting, None)
        if body is None:
            client.socket.close()
            return
        client.ask(body)
        self._watch(client)

    def _watch(self, client: Client) -> None:
        self._clients[client.socket.fileno()] = client
        self._events.register(client.socket, select.EPOLLIN)

    def _forget(self, client: Client) -> None:
        del self._clients[client.socket.fileno()]
        self._events.unregister(client.socket)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    bodies = [json.dumps(body).encode() for body in spec["bodies"]]
    processor = time.process_time()
    asking = Load(spec["url"], "/v1/chat/completions", bodies)
    asking.run(spec["clients"])
    result = {"answers": asking.answers, "client_processor_seconds": time.process_time() - processor}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
