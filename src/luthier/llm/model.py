"""The socket that every model fits: prompts in, answers out.

Three things implement it: an engine process on this machine (:mod:`luthier.llm.local`), any OpenAI-compatible
endpoint (:mod:`luthier.llm.remote`), and the scripted model of the tests (:mod:`luthier.llm.scripted`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from luthier.records.completion import Completion, Sampling
from luthier.records.example import Message

Prompt = Sequence[Message]
OnAnswer = Callable[[int, Completion], None]


class LanguageModel(Protocol):
    """Answers prompts; many at once where the model can."""

    @property
    def name(self) -> str:
        """The name that a person knows the model by."""
        ...

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_answer: OnAnswer | None = None
    ) -> list[Completion]:
        """Return one completion per prompt, in the prompts' order.

        ``on_answer(index, completion)`` is called as each one finishes, in any order.

        Raises:
            InputError: a prompt does not fit the model's context.
            EngineError: the model failed.
        """
        ...

    def close(self) -> None:
        """Free the model; further calls are errors."""
        ...
