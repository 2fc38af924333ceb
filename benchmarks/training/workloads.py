"""The workloads as tokens: made once, then read by every side, so that all train on the same ones.

A prepared workload is one JSON file. Its examples are `{"tokens", "mask"}`, or `{"prompt", "chosen", "rejected"}`
(tokens each) where it is about preferences.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import luthier
from luthier.records.example import Conversation, Message
from luthier.store.store import Store
from luthier.templates.chat_format import ChatFormat
from luthier.templates.renderer import RenderPolicy, tokenize
from luthier.workflows.models import pull
from training import random_llama

BASE = "smollm2-135m"
DATA = Path(__file__).parent.parent / "data"
TWEETS = Path(luthier.__file__).parent / "demo_data" / "tweets.csv"
SENTIMENT = "Classify the sentiment of the tweet as negative, neutral or positive. Answer with one word."
MAX_TOKENS = 1024  # TRL's default max_length, so that its defaults cut nothing
SHORTEST_PIECE = 64
HELD_OUT_TWEETS, HELD_OUT_PIECES, HELD_OUT_ROWS = 60, 8, 4

Tokens = dict[str, list[int]]


@dataclass(frozen=True)
class Workload:
    """What it is, and how many examples make an optimizer step."""

    title: str
    batch: int


WORKLOADS = {
    "A": Workload("short labelled texts under one instruction", batch=16),
    "B": Workload("questions with long answers, no prefix in common", batch=8),
    "C": Workload("raw documents, loss on every token", batch=4),
    "dpo": Workload("preference pairs, beta 0.1", batch=4),
    "llama-2048": Workload("a random Llama, rows of 2,048 tokens", batch=8),
    "llama-8192": Workload("a random Llama, rows of 8,192 tokens", batch=2),
}
RANDOM = "llama-"


def prepare(name: str, home: Path, steps: int, size: str, destination: Path) -> None:
    """Tokenize a workload and write it; the base model is made or pulled in ``home`` where it is not there.

    Of pairs only those of the first ``steps`` steps are kept, since the reference model is asked for all. ``size`` is
    that of a random Llama.
    """
    workload = WORKLOADS[name]
    base, train, held_out = _random(name, home, steps, size) if name.startswith(RANDOM) else _real(name, home)
    if name == "dpo":
        train = train[: steps * workload.batch]
    prepared = {"workload": name, "title": workload.title, "batch": workload.batch, **base}
    destination.write_text(json.dumps({**prepared, "train": train, "held_out": held_out}))


def _real(name: str, home: Path) -> tuple[dict[str, Any], list[Tokens], list[Tokens]]:
    store = Store(home)
    base = pull(store, BASE)
    folder = store.models.base_folder(base)
    chat = ChatFormat.load(folder)
    train, held_out = {"A": _tweets, "B": _problems, "C": _opinions, "dpo": _preferences}[name](chat)
    assert all(len(tokens) <= MAX_TOKENS for example in train for tokens in sequences(example))
    return {"base_folder": str(folder), "base_name": base.id, "parameters": base.parameters}, train, held_out


def _random(name: str, home: Path, steps: int, size: str) -> tuple[dict[str, Any], list[Tokens], list[Tokens]]:
    folder, count = home / f"random-llama-{size}", steps * WORKLOADS[name].batch
    parameters = random_llama.write_base(folder, size)
    rows = random_llama.texts(size, count + HELD_OUT_ROWS, int(name.removeprefix(RANDOM)))
    examples = [{"tokens": tokens, "mask": [1] * len(tokens)} for tokens in rows]
    base = {"base_folder": str(folder), "base_name": folder.name, "parameters": parameters}
    return base, examples[:count], examples[count:]


def sequences(example: Tokens) -> list[list[int]]:
    """Return the token sequences of an example: one, or the two of a pair."""
    if "tokens" in example:
        return [example["tokens"]]
    return [example["prompt"] + example["chosen"], example["prompt"] + example["rejected"]]


def real_tokens(example: Tokens) -> int:
    """Return an example's own tokens, as if nothing were shared or padded."""
    return sum(map(len, sequences(example)))


Sides = tuple[list[Tokens], list[Tokens]]


def _tweets(chat: ChatFormat) -> Sides:
    with TWEETS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    examples = [_answered(chat, row["text"], row["sentiment"], system=SENTIMENT) for row in rows]
    return examples[HELD_OUT_TWEETS:], examples[:HELD_OUT_TWEETS]


def _problems(chat: ChatFormat) -> Sides:
    return _both((line["side"], _answered(chat, line["question"], line["answer"])) for line in _lines("gsm8k.jsonl"))


def _opinions(chat: ChatFormat) -> Sides:
    pieces: list[tuple[str, Tokens]] = []
    for line in _lines("opinions.jsonl"):
        tokens = chat.encode(line["text"])
        cut = [tokens[first : first + MAX_TOKENS] for first in range(0, len(tokens), MAX_TOKENS)]
        pieces += [
            (line["side"], {"tokens": piece, "mask": [1] * len(piece)}) for piece in cut if len(piece) >= SHORTEST_PIECE
        ]
    train, held_out = _both(iter(pieces))
    return train, held_out[:HELD_OUT_PIECES]


def _preferences(chat: ChatFormat) -> Sides:
    pairs = []
    for line in _lines("preferences.jsonl"):
        question = f"{line['instruction']}\n\n{line['input']}".strip()
        chosen, rejected = (_answered(chat, question, line[which]) for which in ("chosen", "rejected"))
        cut = chosen["mask"].index(1)
        assert chosen["tokens"][:cut] == rejected["tokens"][:cut]
        assert not any(rejected["mask"][:cut])
        pair = {
            "prompt": chosen["tokens"][:cut],
            "chosen": chosen["tokens"][cut:],
            "rejected": rejected["tokens"][cut:],
        }
        if max(map(len, sequences(pair))) <= MAX_TOKENS:
            pairs.append((line["side"], pair))
    return _both(iter(pairs))


def _both(lines: Iterator[tuple[str, Tokens]]) -> Sides:
    sides: dict[str, list[Tokens]] = {"train": [], "validation": []}
    for side, example in lines:
        sides[side].append(example)
    return sides["train"], sides["validation"]


def _answered(chat: ChatFormat, user: str, assistant: str, *, system: str | None = None) -> Tokens:
    messages = [Message(role="user", content=user), Message(role="assistant", content=assistant)]
    if system:
        messages.insert(0, Message(role="system", content=system))
    policy = RenderPolicy(max_tokens=4096)
    (example,), _ = tokenize([Conversation(example_id="", messages=tuple(messages))], chat, policy)
    return {"tokens": example.tokens, "mask": [int(learned) for learned in example.loss_mask]}


def _lines(name: str) -> Iterator[dict[str, Any]]:
    with (DATA / name).open(encoding="utf-8") as file:
        yield from map(json.loads, file)
