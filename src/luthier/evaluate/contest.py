"""Lets one contestant (a model, perhaps with a few-shot prompt) answer the held-out examples.

In: a model and conversations. Out: one :class:`~luthier.records.evaluation.Answer` per conversation, in their order.
The log-probability of the expected answer is left None: it takes the weights, and is filled in where they are.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from luthier.evaluate.labels import read_label
from luthier.llm.model import LanguageModel, OnAnswer
from luthier.records.completion import Completion, Sampling
from luthier.records.evaluation import Answer, TaskKind
from luthier.records.example import Conversation, Message

OnProgress = Callable[[int, int], None]


def sample(conversations: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """Return at most ``count`` conversations drawn at random with a seed, in their own order.

    The first ones of a file will not do: files are often sorted by label.
    """
    if len(conversations) <= count:
        return list(conversations)
    chosen = sorted(random.Random(seed).sample(range(len(conversations)), count))  # noqa: S311 - not a secret
    return [conversations[index] for index in chosen]


def answers_of(
    contestant: str,
    model: LanguageModel,
    conversations: Sequence[Conversation],
    sampling: Sampling,
    task: TaskKind,
    labels: Sequence[str] = (),
    shots: Sequence[Message] = (),
    on_progress: OnProgress | None = None,
) -> list[Answer]:
    """Ask the model for the last message of every conversation, all in one batch.

    ``seconds`` of each answer is the wall time of the whole batch divided by its requests: what one request costs
    where many run at once, not how long one waits for it. ``on_progress(done, total)`` counts requests.

    Raises:
        InputError: a prompt does not fit the model's context.
        EngineError: the model failed.
    """
    if not conversations:
        return []
    prompts = [with_shots(conversation.prompt, shots) for conversation in conversations]
    start = time.perf_counter()
    completions = model.answer(prompts, sampling, _counting(len(prompts), on_progress))
    seconds = (time.perf_counter() - start) / len(prompts)
    return [
        _answer(contestant, conversation, completion, task, labels, seconds)
        for conversation, completion in zip(conversations, completions, strict=True)
    ]


def with_shots(prompt: Sequence[Message], shots: Sequence[Message]) -> tuple[Message, ...]:
    """Return the prompt with the shots, which are user and assistant turns, after its leading system messages."""
    systems = next((place for place, message in enumerate(prompt) if message.role != "system"), len(prompt))
    return (*prompt[:systems], *shots, *prompt[systems:])


def _answer(
    contestant: str,
    conversation: Conversation,
    completion: Completion,
    task: TaskKind,
    labels: Sequence[str],
    seconds: float,
) -> Answer:
    return Answer(
        example_id=conversation.example_id,
        contestant=contestant,
        question=next((turn.content for turn in reversed(conversation.prompt) if turn.role == "user"), ""),
        text=completion.text,
        expected=conversation.answer,
        label=read_label(completion.text, labels) if task == "label" else None,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        seconds=seconds,
    )


def _counting(total: int, on_progress: OnProgress | None) -> OnAnswer | None:
    if on_progress is None:
        return None
    report, finished = on_progress, set[int]()

    def count(index: int, _completion: Completion) -> None:
        finished.add(index)
        report(len(finished), total)

    return count
