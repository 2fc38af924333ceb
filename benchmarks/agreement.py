"""Whether a server says what the model says: `python benchmarks/agreement.py [--answers 100] [--json FILE]`.

SmolLM2-135M as GGUF F16 and Q8_0, by Luthier's server in each precision and by llama.cpp's (the xllamacpp wheel). All
get the same prompts as tokens, short answers and long ones, at temperature 0 and 32 at once. Then torch in float32 is
asked for its own choice at every position of each answer, from the weights that the files were made of.

- tokens: the share of positions at which both choose the same
- answers: the share of answers with the same choice everywhere
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from serve import CACHE, quantised
from serving.questions import TWEETS
from serving.sides import MODEL, llama_cpp, luthier

AT_ONCE = 32
KINDS = {
    "short": ("Classify the sentiment of the tweet as negative, neutral or positive. Answer with one word.", 12),
    "long": ("Explain in one or two sentences what the author of this tweet feels and why.", 32),
}
SIDES = {
    "F16": ("auto", "float32", "native", "llama.cpp"),
    "Q8_0": ("auto", "native", "int8", "llama.cpp"),
}
DEADLINE_SECONDS = 600.0

Tokens = list[int]


def main() -> None:
    options = _options()
    home = options.home or CACHE / "home"
    os.environ["LUTHIER_HOME"] = str(home.resolve())
    from luthier.store.store import Store
    from luthier.workflows.models import pull, served_folder

    store = Store(home)
    base = store.models.base_folder(pull(store, MODEL))
    folders = {"F16": served_folder(store, MODEL), "Q8_0": quantised(home)}
    prompts = {kind: _prompts(base, instruction, options.answers) for kind, (instruction, _) in KINDS.items()}
    judge = _Judge(base)
    results = []
    for weights, sides in SIDES.items():
        for side in sides:
            with _server(side, folders[weights], home) as ask:
                found = {kind: _answers(ask, prompts[kind], tokens) for kind, (_, tokens) in KINDS.items()}
            row = {kind: judge.agreement(prompts[kind], answers) for kind, answers in found.items()}
            results.append({"weights": weights, "side": side, **row})
            _say(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100, help="of each kind")
    parser.add_argument("--home", type=Path, help="a home that has the base model")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _prompts(base: Path, instruction: str, count: int) -> list[Tokens]:
    from luthier.records.example import Message
    from luthier.templates.chat_format import ChatFormat

    chat = ChatFormat.load(base)
    with TWEETS.open(encoding="utf-8", newline="") as file:
        tweets = [row["text"] for row in csv.DictReader(file)]
    random.Random(0).shuffle(tweets)
    asked = [f"{instruction}\n\n{tweet}" for tweet in tweets[:count]]
    return [chat.prompt_tokens([Message(role="user", content=text)]) for text in asked]


@contextmanager
def _server(side: str, model: Path, home: Path) -> Iterator[Any]:
    """Run a side; give a function that returns the answer's tokens to a prompt's."""
    with tempfile.TemporaryDirectory() as folder, httpx.Client(timeout=DEADLINE_SECONDS) as client:
        if side == "llama.cpp":
            with llama_cpp(model, AT_ONCE, Path(folder)) as server:
                yield partial(_ask_llama_cpp, client, server.url)
        else:
            with luthier(model, home, Path(folder), side) as server:
                yield partial(_ask_luthier, client, server.url)


def _ask_luthier(client: httpx.Client, url: str, prompt: Tokens, most: int) -> Tokens:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": most, "temperature": 0, "return_token_ids": True}
    return list(_posted(client, f"{url}/v1/completions", body)["choices"][0]["token_ids"])


def _ask_llama_cpp(client: httpx.Client, url: str, prompt: Tokens, most: int) -> Tokens:
    body = {"prompt": prompt, "n_predict": most, "temperature": 0, "return_tokens": True}
    return list(_posted(client, f"{url}/completion", body)["tokens"])


def _posted(client: httpx.Client, url: str, body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.post(url, json=body).raise_for_status().json()
    return found


def _answers(ask: Any, prompts: list[Tokens], most: int) -> list[Tokens]:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda prompt: ask(prompt, most), prompts))


class _Judge:
    """The model in torch, float32."""

    def __init__(self, base: Path) -> None:
        from luthier.llm.engine.row_model import RowModel
        from luthier.llm.engine.torch_model import load_base

        self._model = RowModel(load_base(base, "float32"))

    def agreement(self, prompts: list[Tokens], answers: list[Tokens]) -> dict[str, float]:
        """Return the shares of tokens and of whole answers that are the model's own choice, and how many there were."""
        from luthier.llm.engine.row_model import score_examples
        from luthier.templates.renderer import TokenizedExample

        examples = [
            TokenizedExample("", prompt + answer, [False] * len(prompt) + [True] * len(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer
        ]
        same = [
            [target.chosen == target.token for target in targets]
            for _, targets in score_examples(self._model, examples)
        ]
        count = sum(map(len, same))
        return {"tokens": sum(map(sum, same)) / count, "answers": sum(map(all, same)) / len(same), "count": count}


def _say(result: dict[str, Any]) -> None:
    print(f"{result['weights']:5} {result['side']:10}", end="")
    for kind in KINDS:
        found = result[kind]
        print(f"  {kind}: {found['tokens']:7.2%} of {found['count']:5} tokens, {found['answers']:4.0%} whole", end="")
    print(flush=True)


if __name__ == "__main__":
    main()
