"""How much memory the grammars that answers are bound to hold in an engine, which forgets none by itself.

openvino-genai (2026.4) keeps every compiled grammar as long as its pipeline lives: about 4 MB each for a vocabulary of
49,152 tokens. An engine that is asked for ever new schemas would grow without end.
"""

from __future__ import annotations

BYTES_PER_TOKEN = 90  # of the vocabulary, for each grammar; measured
USUAL_BYTES = 2**30


class GrammarMemory:
    """Counts the grammars of a pipeline.

    Args:
        vocabulary: How many tokens the model has.
        limit_bytes: How much memory grammars may hold.
    """

    def __init__(self, vocabulary: int, limit_bytes: int) -> None:
        self._most = max(1, limit_bytes // (BYTES_PER_TOKEN * vocabulary))
        self._known: set[int] = set()

    def has_room(self, grammar: str | None) -> bool:
        """Say whether an answer may be bound to a grammar; None binds it to nothing."""
        return grammar is None or hash(grammar) in self._known or len(self._known) < self._most

    def note(self, grammar: str | None) -> None:
        """Note that the pipeline has a grammar from now on."""
        if grammar is not None:
            self._known.add(hash(grammar))

    def clear(self) -> None:
        """Forget all, as the pipeline does when it is opened anew."""
        self._known.clear()
