"""Runs a model server as long as its parent lives: ``python -m luthier.llm.server_guard COMMAND …``.

The server gets a session of its own, so that all that it starts can be ended at once. When this process's standard
input ends, because the parent closed it or is gone, the server is asked to end, and killed if it does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 10.0


def main() -> int:
    """Run the command and return its exit status, negative for a signal."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_standard_input, args=(process,), daemon=True).start()
    try:
        return process.wait()
    finally:
        _signal(process, signal.SIGKILL)  # what the server started and left behind


def _end_with_standard_input(process: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 2**12):
        pass
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main() % 256)
