"""One model that reads, in a process of its own: start it, ask it for vectors, cancel, close.

The process (:mod:`luthier.llm.engine.encoder_worker`) lives behind a socket pair (:mod:`luthier.llm.worker_process`).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.llm.worker_process import READY_DEADLINE_SECONDS, WorkerProcess

WORKER_MODULE = "luthier.llm.engine.encoder_worker"


@dataclass(frozen=True)
class VectorsDelta:
    """Some vectors of a request by the places of their texts, and whether they are the last ones."""

    vectors: dict[int, NDArray[np.float32]]
    is_last: bool


class EncoderProcess(WorkerProcess[VectorsDelta]):
    """A running encoder. Make it with :meth:`start`; all calls belong to the event loop that started it."""

    @classmethod
    async def start(
        cls, folder: Path, threads: int = 0, ready_deadline_seconds: float = READY_DEADLINE_SECONDS
    ) -> EncoderProcess:
        """Start an encoder on a base model's folder and wait until it is ready; ``threads`` 0 lets it choose.

        Raises:
            EngineError: it died or was not ready in time; the end of its stderr is among the problems.
        """
        return await cls._started(folder, WORKER_MODULE, ["--threads", str(threads)], ready_deadline_seconds)

    async def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return one vector of length 1 for each text, which is given as tokens: (texts, dimensions).

        Cancelling the task that waits drops in the process what is not computed yet.

        Raises:
            EngineError: the encoder refused a text, or it died.
        """
        found: dict[int, NDArray[np.float32]] = {}
        message = {"op": "embed", "texts": [list(text) for text in texts]}
        async with aclosing(self._outcomes(message, lambda delta: delta.is_last)) as deltas:
            async for delta in deltas:
                found.update(delta.vectors)
        return np.stack([found[index] for index in range(len(texts))])

    def _receive(self, message: dict[str, Any]) -> None:
        vectors = {index: np.frombuffer(base64.b64decode(data), "<f4") for index, data in message["vectors"]}
        self._hand(message["id"], VectorsDelta(vectors, message["last"]))
