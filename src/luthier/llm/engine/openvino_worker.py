"""The process that runs one model with openvino-genai's continuous batching, and talks JSON lines over a socket.

Started by :mod:`luthier.llm.engine_process` as ``python -m luthier.llm.engine.openvino_worker --model FOLDER --fd N``.

In:  ``{"op": "generate", "id", "tokens", "sampling", "stop_tokens"}``, ``{"op": "cancel", "id"}``,
``{"op": "shutdown"}``

Out: ``{"op": "ready", …}``, ``{"op": "step", "deltas": [[id, tokens, logprobs, finish_reason or null], …]}`` (one line
per step of the engine), ``{"op": "error", "id", "message"}``, ``{"op": "reopened", …}`` (to forget grammars)
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from luthier.llm.engine.expanded_gguf import expanded
from luthier.llm.engine.grammar_memory import USUAL_BYTES, GrammarMemory
from luthier.llm.engine.openvino_numerics import is_quantised, plugin_properties
from luthier.llm.engine.prefix_gate import PrefixGate, prefix_blocks
from luthier.llm.engine.worker_socket import WorkerSocket, worker_arguments

TELEMETRY_MODULE = "openvino_telemetry"
MAX_BATCHED_TOKENS = 256
MAX_SEQUENCES = 256
SEED_BITS = 31
LARGEST_MIN_P = 0.999999  # 1, at which only the likeliest token is left, is refused by openvino-genai


def main() -> None:
    """Load the model, say "ready", and serve until told to stop or until the parent is gone."""
    options = _arguments()
    connection = WorkerSocket(options.fd)
    started = time.monotonic()
    forbid_telemetry()
    path = options.model / "model.gguf"
    reopen = partial(open_pipeline, path, options.cache_gigabytes, options.precision, options.threads)
    pipeline, properties = reopen()
    limit = USUAL_BYTES + path.stat().st_size if options.grammar_bytes is None else options.grammar_bytes
    grammars = GrammarMemory(len(pipeline.get_tokenizer().get_vocab()), limit)
    connection.send({"op": "ready", "load_seconds": time.monotonic() - started, "properties": properties})
    Worker(pipeline, connection, lambda: reopen()[0], grammars).run()


def forbid_telemetry() -> None:
    """Make ``import openvino_telemetry`` fail, for which openvino has a stub that sends nothing.

    Its own opt-out is a file in the home directory, and no file means consent; a module that cannot be imported
    cannot send.
    """
    sys.modules[TELEMETRY_MODULE] = None  # type: ignore[assignment]


def open_pipeline(path: Path, cache_gigabytes: int, precision: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load a GGUF file; return the pipeline and its properties.

    Weights that are integers are expanded first, unless they are to meet other integers.
    """
    with nullcontext(path) if precision == "int8" else expanded(path) as readable:
        properties = plugin_properties(precision, is_quantised(readable), threads)
        return load_pipeline(readable, cache_gigabytes, properties), properties


def load_pipeline(path: Path, cache_gigabytes: int, properties: dict[str, Any]) -> Any:
    """Load a GGUF file; imported here, because importing takes a second and must follow :func:`forbid_telemetry`."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = cache_gigabytes
    scheduler.enable_prefix_caching = True
    scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
    scheduler.max_num_seqs = MAX_SEQUENCES
    return openvino_genai.ContinuousBatchingPipeline(str(path), scheduler, "CPU", properties)


@dataclass
class Request:
    """One prompt on its way: waiting without a handle, then running with one."""

    id: int
    tokens: list[int]
    config: Any
    blocks: list[int]
    grammar: str | None = None
    handle: Any = field(default=None)
    has_token: bool = False


class Worker:
    """Moves requests from the inbox into the pipeline, steps it, and sends what each step produced.

    Args:
        pipeline: The model.
        connection: Where requests come from, and answers go.
        reopen: Opens the pipeline anew, when grammars hold too much memory.
        grammars: How much they may hold.
    """

    def __init__(
        self, pipeline: Any, connection: WorkerSocket, reopen: Callable[[], Any], grammars: GrammarMemory
    ) -> None:
        self._pipeline = pipeline
        self._reopen = reopen
        self._grammars = grammars
        self._connection = connection
        self._inbox = connection.inbox
        self._gate = PrefixGate()
        self._end: int = pipeline.get_tokenizer().get_eos_token_id()
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, Request] = {}

    def run(self) -> None:
        """Serve forever; the reader thread ends the process."""
        while True:
            for message in self._messages():
                self._handle(message)
            self._admit()
            if self._pipeline.has_non_finished_requests():
                self._step()
            self._send_deltas()

    def _step(self) -> None:
        """Compute a token of every answer. Where that fails, what is known of the answers under way is not sure."""
        try:
            self._pipeline.step()
        except RuntimeError as error:
            for request_id in list(self._running):
                self._cancel(request_id)
                self._fail(request_id, f"A step of the engine failed: {error}")

    def _messages(self) -> Iterator[dict[str, Any]]:
        idle = not self._waiting and not self._running and not self._pipeline.has_non_finished_requests()
        if idle:
            yield self._inbox.get()
        while not self._inbox.empty():
            yield self._inbox.get()

    def _handle(self, message: dict[str, Any]) -> None:
        if message["op"] == "cancel":
            self._cancel(message["id"])
        elif message["op"] == "generate":
            config = generation_config(message["sampling"], self._stop_tokens(message))
            tokens = message["tokens"]
            constraint = message["sampling"]["constraint"]
            grammar = constraint and constraint["grammar"]
            self._waiting[message["id"]] = Request(message["id"], tokens, config, prefix_blocks(tokens), grammar)

    def _stop_tokens(self, message: dict[str, Any]) -> list[int]:
        """Return the tokens that end an answer.

        A grammar knows one token as the end, and takes others for their texts, which may stand in a string. Without
        one, there would be nothing to go on with behind the end.
        """
        stop_tokens: list[int] = message["stop_tokens"]
        is_bound = message["sampling"]["constraint"] is not None
        return [self._end] if is_bound and (self._end in stop_tokens or not stop_tokens) else stop_tokens

    def _cancel(self, request_id: int) -> None:
        self._waiting.pop(request_id, None)
        request = self._running.pop(request_id, None)
        if request is not None:
            request.handle.cancel()
            self._gate.abandon(request_id)

    def _admit(self) -> None:
        for request in list(self._waiting.values()):
            if not self._grammars.has_room(request.grammar):
                if self._running or self._pipeline.has_non_finished_requests():
                    return  # those behind it wait too, so that it is their turn soon
                self._forget_grammars()
            if self._gate.may_start(request.blocks):
                del self._waiting[request.id]
                self._start(request)

    def _forget_grammars(self) -> None:
        started = time.monotonic()
        self._pipeline = None
        gc.collect()
        self._pipeline = self._reopen()
        self._grammars.clear()
        self._gate = PrefixGate()
        self._connection.send({"op": "reopened", "load_seconds": time.monotonic() - started})

    def _start(self, request: Request) -> None:
        import openvino

        tensor = openvino.Tensor(np.array([request.tokens], dtype=np.int64))
        try:
            request.handle = self._pipeline.add_request(request.id, tensor, request.config)
        except RuntimeError as error:  # what openvino raises for a request that breaks its rules
            self._fail(request.id, str(error))
            return
        self._grammars.note(request.grammar)
        self._gate.start(request.id, request.blocks)
        self._running[request.id] = request

    def _send_deltas(self) -> None:
        deltas = [delta for request in list(self._running.values()) if (delta := self._read(request))]
        if deltas:
            self._connection.send({"op": "step", "deltas": deltas})

    def _read(self, request: Request) -> list[Any] | None:
        """Return what is new of one request as [id, tokens, logprobs, finish reason], or None."""
        status = request.handle.get_status().name
        outputs = _read_outputs(request.handle)
        tokens = [token for output in outputs for token in output.generated_ids]
        logprobs = []
        if request.config.logprobs:
            logprobs = [round(value, 6) for output in outputs for value in output.generated_log_probs]
        if tokens and not request.has_token:
            request.has_token = True
            self._gate.computed(request.id)
        if status == "RUNNING":
            return [request.id, tokens, logprobs, None] if tokens else None
        del self._running[request.id]
        self._gate.abandon(request.id)
        if status == "IGNORED":
            self._fail(
                request.id, f"A prompt of {len(request.tokens)} tokens and its answer do not fit the engine's cache."
            )
            return None
        ran_out = bool(outputs) and outputs[-1].finish_reason.name == "LENGTH"
        return [request.id, tokens, logprobs, "length" if ran_out else "stop"]

    def _fail(self, request_id: int, message: str) -> None:
        self._connection.send({"op": "error", "id": request_id, "message": message})


def generation_config(sampling: dict[str, Any], stop_tokens: list[int]) -> Any:
    """Return openvino-genai's configuration for a :class:`luthier.records.completion.Sampling` as a dict.

    A request without a seed gets a random one: the engine's own default is the same seed for every request.
    """
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = sampling["max_tokens"]
    config.logprobs = 0 if sampling["logprobs"] is None else 1  # they cost a look at the whole vocabulary
    config.do_sample = sampling["temperature"] > 0
    if config.do_sample:
        config.temperature = sampling["temperature"]
        config.top_p = sampling["top_p"]
        config.min_p = min(sampling["min_p"], LARGEST_MIN_P)
        if sampling["top_k"] is not None:
            config.top_k = sampling["top_k"]
        seed = sampling["seed"]
        config.rng_seed = random.getrandbits(SEED_BITS) if seed is None else seed % 2**SEED_BITS
    config.presence_penalty = sampling["presence_penalty"]
    config.frequency_penalty = sampling["frequency_penalty"]
    config.repetition_penalty = sampling["repetition_penalty"]
    if sampling["constraint"] is not None:
        grammar = sampling["constraint"]["grammar"]
        config.structured_output_config = openvino_genai.StructuredOutputConfig(grammar=grammar)
    config.stop_token_ids = set(stop_tokens)
    if stop_tokens:
        config.eos_token_id = min(stop_tokens)
    else:
        config.ignore_eos = True
    return config


def _read_outputs(handle: Any) -> list[Any]:
    outputs = []
    while handle.can_read():
        outputs += handle.read().values()
    return outputs


def _arguments() -> argparse.Namespace:
    parser = worker_arguments(__doc__)
    parser.add_argument("--cache-gigabytes", type=int, default=2)
    parser.add_argument("--grammar-bytes", type=int)
    parser.add_argument("--precision", default="auto")  # EngineOptions knows which there are
    return parser.parse_args()


if __name__ == "__main__":
    main()
