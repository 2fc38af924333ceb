"""A small server that speaks vLLM's dialect of OpenAI's API, for tests on machines without vLLM.

Routes, chunks and error shapes are those of vLLM 0.10.2 and later: its ``entrypoints/openai/completion`` (protocol and
serving), ``entrypoints/openai/models/serving.py`` (adapters) and ``docs/features/lora.md``. The model itself is a
formula: the next token follows from the sum of all tokens before it and from the adapter.

As a command: ``python vllm_dialect.py --model FOLDER --port PORT [--die-on TOKEN]``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from tokenizers import Tokenizer

VOCABULARY = 300
FIRST_PLAIN_TOKEN = 3
SLOW_SECONDS = 0.02


@dataclass
class Dialect:
    """What the server has, what it was asked, and how it is to misbehave."""

    folder: Path
    served_name: str
    gives_token_ids: bool = True
    die_on: int | None = None
    refuse_with: int | None = None
    fail_in_stream: bool = False
    max_model_len: int = 2048
    adapters: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    aborted: int = 0
    running: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def next_token(tokens: list[int], adapter: str | None) -> int:
    """Return the token that the formula gives."""
    return FIRST_PLAIN_TOKEN + (sum(tokens) * 31 + len(tokens) + len(adapter or "")) % (VOCABULARY - FIRST_PLAIN_TOKEN)


def continuation(prompt: list[int], count: int, adapter: str | None = None) -> list[int]:
    """Return so many tokens of the answer to a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, adapter))
    return tokens[len(prompt) :]


def create_app(dialect: Dialect) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/asked")
    async def asked() -> dict[str, Any]:
        return {"requests": dialect.requests, "calls": dialect.calls, "pid": os.getpid()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        base = _card(dialect.served_name, str(dialect.folder), None) | {"max_model_len": dialect.max_model_len}
        return {
            "object": "list",
            "data": [base, *(_card(name, path, dialect.served_name) for name, path in dialect.adapters.items())],
        }

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        dialect.calls.append(f"load {name}")
        if name in dialect.adapters:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
            return _error(400, message, "InvalidUserInput")
        if not (Path(path) / "adapter_config.json").is_file():
            message = f"Loading lora {name} failed: No adapter found for {path}"
            return _error(404, message, "NotFoundError")
        dialect.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        name = (await request.json())["lora_name"]
        dialect.calls.append(f"unload {name}")
        if name not in dialect.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        del dialect.adapters[name]
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        dialect.requests.append(body)
        if dialect.refuse_with is not None:
            return _error(dialect.refuse_with, "The server is busy.", "ServiceUnavailableError")
        if body["model"] != dialect.served_name and body["model"] not in dialect.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError", param="model")
        if any(token >= VOCABULARY + 100 for token in body["prompt"]):
            return _error(400, f"Token id {max(body['prompt'])} is out of vocabulary", "BadRequestError")
        return StreamingResponse(_stream(dialect, body), media_type="text/event-stream")

    return app


async def _stream(dialect: Dialect, body: dict[str, Any]) -> AsyncIterator[str]:
    dialect.running += 1
    finished = False
    try:
        adapter = dialect.adapters.get(body["model"])
        tokens = list(body["prompt"])
        stops = set(body["stop_token_ids"])
        slow = body["max_tokens"] > 500
        for index in range(body["max_tokens"]):
            token = next_token(tokens, adapter)
            tokens.append(token)
            if dialect.die_on is not None and token == dialect.die_on:
                os._exit(7)
            if dialect.fail_in_stream and index == 2:
                yield _event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
                break
            stopped = token in stops
            reason = "stop" if stopped else "length" if index + 1 == body["max_tokens"] else None
            yield _event({"choices": [_choice(dialect, body, token, stopped, reason, first=index == 0)]})
            if reason:
                count = index + 1
                usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
                yield _event({"choices": [], "usage": usage | {"total_tokens": len(body["prompt"]) + count}})
                break
            await asyncio.sleep(SLOW_SECONDS if slow else 0)
        finished = True
        yield "data: [DONE]\n\n"
    finally:
        dialect.running -= 1
        dialect.aborted += not finished


def _choice(
    dialect: Dialect, body: dict[str, Any], token: int, stopped: bool, reason: str | None, *, first: bool
) -> dict[str, Any]:
    text = "" if stopped else dialect.tokenizer.decode([token])
    choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    choice["stop_reason"] = token if stopped else None
    if dialect.gives_token_ids and body.get("return_token_ids"):
        choice["prompt_token_ids"] = body["prompt"] if first else None
        choice["token_ids"] = [token]
    if body.get("logprobs") is not None:
        names = [text, dialect.tokenizer.decode([token + 1])]
        if body.get("return_tokens_as_token_ids"):
            names = [f"token_id:{token}", f"token_id:{token + 1}"]
        top = [dict(zip(names[: body["logprobs"] or 1], (-0.5, -1.5), strict=False))]
        choice["logprobs"] = {"text_offset": [0], "token_logprobs": [-0.5], "tokens": names[:1], "top_logprobs": top}
    return choice


def _event(body: dict[str, Any]) -> str:
    envelope = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
    return f"data: {json.dumps(envelope | body)}\n\n"


def _card(name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": root, "parent": parent}


def _error(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)


class Running:
    """The server in a thread of this process."""

    def __init__(self, dialect: Dialect) -> None:
        self.server = uvicorn.Server(uvicorn.Config(create_app(dialect), port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--die-on", type=int)
    parser.add_argument("--enable-lora", action="store_true")
    options = parser.parse_args()
    served = Dialect(options.model, str(options.model), die_on=options.die_on)
    uvicorn.run(create_app(served), port=options.port, log_level="warning")
