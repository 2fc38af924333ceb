"""A model that answers by a script: for tests, and for trying a workflow without weights.

It fits the same socket as every other model (:class:`luthier.llm.model.LanguageModel`), obeys ``max_tokens``, ``stop``
and a context length, and can be told to fail. A token is a word between white space. Temperature, seeds and
penalties change nothing: a script has no randomness.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from luthier.errors import EngineError, InputError
from luthier.llm.model import OnAnswer, Prompt
from luthier.records.completion import Completion, FinishReason, Sampling
from luthier.records.example import Message

Rule = Callable[[Prompt], str]
_WORD = re.compile(r"\S+")


class ScriptedModel:
    """Answers from a mapping of last user texts, else by a rule.

    Args:
        answers: The last user message's text → the answer.
        rule: Makes the answer from the whole prompt where ``answers`` has none; without it such a prompt fails.
        name: What the model calls itself.
        context_length: The most words that prompt and answer may have together; None has no limit.
        fail_on: The prompt, counted from 1 over the model's life, at which the engine "dies".

    ``asked`` holds every prompt that was answered, oldest first.
    """

    def __init__(
        self,
        answers: Mapping[str, str] | None = None,
        rule: Rule | None = None,
        *,
        name: str = "scripted",
        context_length: int | None = None,
        fail_on: int | None = None,
    ) -> None:
        self._answers = dict(answers or {})
        self._rule = rule
        self._name = name
        self._context_length = context_length
        self._fail_on = fail_on
        self._closed = False
        self.asked: list[tuple[Message, ...]] = []

    @property
    def name(self) -> str:
        """The name that a person knows the model by."""
        return self._name

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_answer: OnAnswer | None = None
    ) -> list[Completion]:
        """Return one completion per prompt, in order; they take 0 seconds.

        Raises:
            InputError: a prompt is longer than the context length; no prompt of the call was answered.
            EngineError: the script has no answer, says to fail here, or the model is closed.
        """
        if self._closed:
            raise EngineError(f"{self._name} is closed.")
        for prompt in prompts:
            self._check_length(prompt)
        completions = []
        for index, prompt in enumerate(prompts):
            completions.append(self._complete(prompt, sampling))
            if on_answer:
                on_answer(index, completions[-1])
        return completions

    def close(self) -> None:
        """Refuse all further prompts."""
        self._closed = True

    def _check_length(self, prompt: Prompt) -> None:
        words = _words(prompt)
        if self._context_length is not None and words >= self._context_length:
            raise InputError(
                f"A prompt of {words} tokens leaves no room for an answer in {self._name}'s context of "
                f"{self._context_length} tokens."
            )

    def _complete(self, prompt: Prompt, sampling: Sampling) -> Completion:
        if self._fail_on == len(self.asked) + 1:
            raise EngineError(f"{self._name} failed at prompt {self._fail_on}, as its script says.")
        text = self._scripted(prompt)
        self.asked.append(tuple(prompt))
        prompt_tokens = _words(prompt)
        room = sampling.max_tokens
        if self._context_length is not None:
            room = min(room, self._context_length - prompt_tokens)
        text, finish_reason = _cut(text, sampling.stop, room)
        return Completion(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(text.split()),
            seconds=0.0,
        )

    def _scripted(self, prompt: Prompt) -> str:
        last = next((message.content for message in reversed(prompt) if message.role == "user"), "")
        if last in self._answers:
            return self._answers[last]
        if self._rule is None:
            raise EngineError(f"The script of {self._name} has no answer to {last!r}.")
        return self._rule(prompt)


def _words(prompt: Prompt) -> int:
    return sum(len(message.content.split()) for message in prompt)


def _cut(text: str, stop: Sequence[str], max_words: int) -> tuple[str, FinishReason]:
    """Return the text before the first stop string, of at most ``max_words`` words, and why it ends there."""
    text = text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]
    words = list(_WORD.finditer(text))
    if len(words) <= max_words:
        return text, "stop"
    return text[: words[max_words - 1].end()], "length"
