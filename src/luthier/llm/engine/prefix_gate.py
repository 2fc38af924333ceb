"""Which waiting requests may start now, so that a prefix which many prompts share is computed once.

An engine's prefix cache only helps a request whose prefix was computed before the request was added. A hundred
few-shot prompts that arrive together would therefore each compute the same shots. The gate lets one of them go
first and holds the others until its first token is there.
"""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_TOKENS = 64
MAX_REMEMBERED_BLOCKS = 200_000


def prefix_blocks(tokens: Sequence[int]) -> list[int]:
    """Return one hash per full block of 64 tokens; each covers everything from the start of the prompt."""
    hashes: list[int] = []
    previous = 0
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        previous = hash((previous, *tokens[end - BLOCK_TOKENS : end]))
        hashes.append(previous)
    return hashes


class PrefixGate:
    """Remembers which prefixes are computed and which are being computed, and by which request."""

    def __init__(self) -> None:
        self._computed: set[int] = set()
        self._owners: dict[int, int] = {}
        self._blocks: dict[int, list[int]] = {}

    def may_start(self, blocks: Sequence[int]) -> bool:
        """Say whether no running request is computing a prefix that these blocks share and nobody has yet."""
        missing = next((block for block in blocks if block not in self._computed), None)
        return missing is None or missing not in self._owners

    def start(self, request: int, blocks: Sequence[int]) -> None:
        """Note that a request begins to compute its blocks."""
        mine = [block for block in blocks if block not in self._computed and block not in self._owners]
        self._owners.update(dict.fromkeys(mine, request))
        self._blocks[request] = mine

    def computed(self, request: int) -> None:
        """Note that a request has its first token, so that its blocks are in the engine's cache."""
        if len(self._computed) > MAX_REMEMBERED_BLOCKS:
            self._computed.clear()
        self._computed.update(self._release(request))

    def abandon(self, request: int) -> None:
        """Forget a request that ended before its first token."""
        self._release(request)

    def _release(self, request: int) -> list[int]:
        blocks = self._blocks.pop(request, [])
        for block in blocks:
            self._owners.pop(block, None)
        return blocks
