"""The process that makes vectors of texts with one encoder in torch, and talks JSON lines over a socket.

Started by :mod:`luthier.llm.encoder_process` as ``python -m luthier.llm.engine.encoder_worker --model FOLDER --fd N``.

In:  ``{"op": "embed", "id", "texts": [[token, …], …]}``, ``{"op": "cancel", "id"}``, ``{"op": "shutdown"}``

Out: ``{"op": "ready", …}``, ``{"op": "vectors", "id", "vectors": [[place, base64 of float32, little-endian], …],
"last"}`` (one line per step and request), ``{"op": "error", "id", "message"}``

Names end in their dimensions: N texts, L tokens of the longest one, D numbers of a vector.
"""

from __future__ import annotations

import base64
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from luthier.llm.embedding_format import EmbeddingFormat, Pooling
from luthier.llm.engine.text_batches import by_length, padded
from luthier.llm.engine.torch_model import load_base
from luthier.llm.engine.worker_socket import Message, WorkerSocket, worker_arguments

TOKENS_PER_STEP = 2048
WINDOW = 256


def main() -> None:
    """Load the model, say "ready", and serve until told to stop or until the parent is gone."""
    options = worker_arguments(__doc__).parse_args()
    connection = WorkerSocket(options.fd)
    started = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = EmbeddingModel(options.model)
    connection.send({"op": "ready", "load_seconds": time.monotonic() - started})
    Worker(model, connection).run()


class EmbeddingModel:
    """An encoder without a head, in float32."""

    def __init__(self, folder: Path) -> None:
        self._model = load_base(folder, "float32", kind=AutoModel)
        self._pooling: Pooling = EmbeddingFormat.load(folder).pooling

    @torch.inference_mode()
    def vectors(self, texts: list[list[int]]) -> np.ndarray:
        """Return one vector of length 1 for each text: (N, D) in float32."""
        tokens_NL, real_NL = (tensor.to(self._model.device) for tensor in padded(texts))
        hidden_NLD = self._model(input_ids=tokens_NL, attention_mask=real_NL).last_hidden_state
        pooled_ND = hidden_NLD[:, 0] if self._pooling == "cls" else _mean(hidden_NLD, real_NL)
        return torch.nn.functional.normalize(pooled_ND, dim=1).float().cpu().numpy()


@dataclass
class Request:
    """Texts on their way; those that are done leave."""

    id: int
    texts: dict[int, list[int]] = field(default_factory=dict)


class Worker:
    """Takes texts of all requests in turns, similar lengths together, and sends their vectors after each step."""

    def __init__(self, model: EmbeddingModel, connection: WorkerSocket) -> None:
        self._model = model
        self._connection = connection
        self._waiting: dict[int, Request] = {}

    def run(self) -> None:
        """Serve forever; the reader thread ends the process."""
        while True:
            for message in self._messages():
                self._handle(message)
            if self._waiting:
                self._step()

    def _messages(self) -> Iterator[Message]:
        inbox = self._connection.inbox
        if not self._waiting:
            yield inbox.get()
        while not inbox.empty():
            yield inbox.get()

    def _handle(self, message: Message) -> None:
        if message["op"] == "cancel":
            self._waiting.pop(message["id"], None)
        elif message["op"] == "embed":
            self._waiting[message["id"]] = Request(message["id"], dict(enumerate(message["texts"])))

    def _step(self) -> None:
        batch = self._next_batch()
        try:
            vectors_ND = self._model.vectors([request.texts[place] for request, place in batch])
        except (RuntimeError, IndexError, ValueError) as error:  # what torch raises, for want of memory too
            for request in {request.id: request for request, _ in batch}.values():
                del self._waiting[request.id]
                self._connection.send({"op": "error", "id": request.id, "message": str(error)})
            return
        found: dict[int, list[Any]] = defaultdict(list)
        for (request, place), vector_D in zip(batch, vectors_ND, strict=True):
            del request.texts[place]
            found[request.id].append([place, base64.b64encode(vector_D.astype("<f4").tobytes()).decode()])
        for id, vectors in found.items():
            request = self._waiting.pop(id)
            self._connection.send({"op": "vectors", "id": id, "vectors": vectors, "last": not request.texts})
            if request.texts:  # whoever was served goes behind the others
                self._waiting[id] = request

    def _next_batch(self) -> list[tuple[Request, int]]:
        """Return the texts of the next step: the first of the request that waited longest, and others of its length."""
        turns = zip_longest(*([(request, place) for place in request.texts] for request in self._waiting.values()))
        window = list(islice((one for one in chain.from_iterable(turns) if one is not None), WINDOW))
        batches = by_length([len(request.texts[place]) for request, place in window], TOKENS_PER_STEP)
        return [window[index] for index in next(batch for batch in batches if 0 in batch)]


def _mean(hidden_NLD: torch.Tensor, real_NL: torch.Tensor) -> torch.Tensor:
    weights_NL1 = real_NL[:, :, None].to(hidden_NLD.dtype)
    return (hidden_NLD * weights_NL1).sum(1) / weights_NL1.sum(1).clamp(min=1e-9)


if __name__ == "__main__":
    main()
