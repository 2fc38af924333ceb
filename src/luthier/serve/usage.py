"""What a request uses of models: counted where the tokens are made, read where the request is answered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Usage:
    """What one request has used so far. All tasks that work for it share it, through :data:`USAGE`."""

    started: float = field(default_factory=time.perf_counter)
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None
    _prompt: Sequence[int] | None = None

    @property
    def tokens(self) -> int:
        """All tokens that were read and made."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, other: Usage) -> None:
        """Count what a request within this one used."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def add_prompt(self, prompt_tokens: Sequence[int]) -> bool:
        """Count a prompt, once for all answers to it; return whether it was new."""
        if prompt_tokens is self._prompt:
            return False
        self._prompt = prompt_tokens
        self.prompt_tokens += len(prompt_tokens)
        return True


USAGE: ContextVar[Usage | None] = ContextVar("luthier.usage", default=None)
