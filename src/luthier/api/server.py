"""An application on a port, until a signal ends it."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from luthier.errors import ConflictError, InputError

GRACE_SECONDS = 10
OnReady = Callable[[str], None]


def serve(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: OnReady | None = None,
    grace_seconds: int = GRACE_SECONDS,
) -> None:
    """Serve an application until SIGINT or SIGTERM; requests under way get some seconds to finish.

    Args:
        app: The application; its own shutdown frees what it holds.
        host: The address to bind.
        port: The port to bind; 0 takes a free one.
        on_ready: Called with the URL once requests are answered.
        grace_seconds: How long requests under way may take at the end; then they are broken off.

    Raises:
        ConflictError: the port is taken.
        InputError: the address does not belong to this machine, or the port needs more rights.
    """
    listener = listen(host, port)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: None)  # uvicorn raises it again after its own shutdown, which is all there is
    with listener:
        Server(app, listener, on_ready, grace_seconds).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address.

    Raises:
        ConflictError: the port is taken.
        InputError: the address does not belong to this machine, or the port needs more rights.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise InputError(f"Cannot bind {host}:{port}: {error.strerror}.") from error
        raise ConflictError(
            f"The port {port} on {host} is taken.", hint="choose another --port, or 0 for any"
        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, quiet, on a bound socket; tells when it is ready."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        on_ready: OnReady | None = None,
        grace_seconds: int = GRACE_SECONDS,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,  # its lines go where the others go
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=grace_seconds,
            )
        )
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then tell."""
        await super().startup(sockets=sockets)
        if self.started and self._on_ready is not None:
            self._on_ready(self.url)
