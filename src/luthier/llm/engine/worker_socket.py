"""The worker's end of the socket pair: JSON lines come into an inbox, and JSON lines go out.

The process ends at once when its socket closes, so that no engine outlives its parent, however the parent died.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import threading
from pathlib import Path
from typing import Any

Message = dict[str, Any]


class WorkerSocket:
    """A connection to the parent.

    Args:
        descriptor: The inherited socket's file descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._connection = socket.socket(fileno=descriptor)
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message; end the process where nobody is left to read it."""
        try:
            self._connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        except OSError:  # the parent is gone
            os._exit(0)

    def _read(self) -> None:
        """Feed the inbox; end the process when asked to, or when the parent is gone, even in the middle of a step."""
        try:
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message["op"] == "shutdown":
                        break
                    self.inbox.put(message)
        finally:  # a parent that is killed may leave half a line, or reset the connection
            os._exit(0)


def worker_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every worker is told: its model's folder, its socket, and how many threads it may use."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    return parser
