"""What the clients ask: vader_tweets and gsm8k in turn, with instructions that make long answers."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import luthier

TWEETS = Path(luthier.__file__).parent / "demo_data" / "tweets.csv"
SUMS = Path(__file__).parent.parent / "data" / "gsm8k.jsonl"
TWEET_TASKS = (
    "Write a long story that begins with this tweet: {}",
    "Explain in many sentences what the author of this tweet feels and why: {}",
    "Write a letter of several paragraphs to the author of this tweet: {}",
)
SUM_TASKS = ("Solve this step by step, and explain every step at length: {}", "Make a long story out of this sum: {}")
TOKENS = (32, 96)  # the shortest and the longest answer; they differ, so that clients do not march in step


def questions() -> list[str]:
    """Return all questions in an order that is the same every time."""
    with TWEETS.open(encoding="utf-8", newline="") as file:
        tweets = [row["text"] for row in csv.DictReader(file)]
    sums = [json.loads(line)["question"] for line in SUMS.read_text("utf-8").splitlines()]
    of_tweets = [task.format(text) for task in TWEET_TASKS for text in _shuffled(tweets)]
    of_sums = [task.format(text) for task in SUM_TASKS for text in _shuffled(sums)]
    both = [question for pair in zip(of_tweets, of_sums, strict=False) for question in pair]
    return both + of_tweets[len(of_sums) :]


def requests(count: int, skip: int, tokens: tuple[int, int] = TOKENS) -> list[dict[str, Any]]:
    """Return questions with the length of their answers; ``skip`` leaves out those that were asked before."""
    known = questions()
    lengths = random.Random(skip)
    return [
        {"question": known[index % len(known)], "max_tokens": lengths.randint(*tokens)}
        for index in range(skip, skip + count)
    ]


def _shuffled(texts: list[str]) -> list[str]:
    return random.Random(0).sample(texts, len(texts))
