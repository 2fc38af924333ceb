"""Serving throughput of the base model: `python benchmarks/serve_throughput.py [--clients 1 8 32] [--json FILE]`.

Starts a real server in a process of its own and loads it with streaming clients, each asking one question after the
other (prompts from the demo's tweets, 64 tokens an answer, temperature 0). Prints tokens per second over all clients,
and the time to the first token at the median and the 99th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx

import luthier
from luthier.store.store import Store
from luthier.workflows.models import pull, served_folder
from luthier.workflows.serving import server_process

MODEL = "smollm2-135m"
ANSWER_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="questions per client")
    parser.add_argument("--home", type=Path, default=None, help="a home that has the base model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(options.home or Path(temporary))
        pull(store, MODEL)
        with server_process(store.home, {MODEL: served_folder(store, MODEL)}) as url:
            asyncio.run(load(url, 1, 1))  # loads the model
            results = [asyncio.run(load(url, clients, options.requests)) for clients in options.clients]
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


async def load(url: str, clients: int, requests: int) -> dict[str, float]:
    """Ask with so many clients at once; return the rates."""
    with (Path(luthier.__file__).parent / "demo_data" / "tweets.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    firsts: list[float] = []
    tokens = 0
    started = time.perf_counter()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        nonlocal tokens
        for turn in range(requests):
            text = texts[(number * requests + turn + 37 * clients) % len(texts)]
            first, count = await ask(http, url, f"Write a reply to this tweet: {text}")
            firsts.append(first)
            tokens += count

    async with httpx.AsyncClient(timeout=600) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    seconds = time.perf_counter() - started
    firsts.sort()
    return {
        "clients": clients,
        "tokens_per_second": tokens / seconds,
        "first_token_p50_seconds": statistics.median(firsts),
        "first_token_p99_seconds": firsts[min(len(firsts) - 1, int(len(firsts) * 0.99))],
    }


async def ask(http: httpx.AsyncClient, url: str, question: str) -> tuple[float, int]:
    """Return the seconds to the first piece of text, and the answer's tokens."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, count = time.perf_counter(), 0.0, 0
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content") and not first:
                first = time.perf_counter() - started
            if chunk.get("usage"):
                count = chunk["usage"]["completion_tokens"]
    return first, count


if __name__ == "__main__":
    main()
