"""Where the tokens of a row stand, in the form that attention needs; made once per row and used by every layer.

Names end in their dimensions: T tokens of the row, N sequences of a block, L the longest of them, P prefix, S = P + L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from luthier.llm.rows import Group

SIMILAR = 0.75  # rests at least this share of the longest one's length are padded to it and attend in one batch


@dataclass(frozen=True)
class Block:
    """Sequences of one group that attend together: each sees ``prefix`` and, causally, itself.

    ``gather_NL`` is the index in the row of every token (padding points at the row's first one), ``real_NL`` which
    are none; ``rests_R`` is the index into the flattened N x L of each real token; ``rows_R`` the index in the row of
    those.
    """

    prefix: slice
    gather_NL: torch.Tensor
    real_NL: torch.Tensor
    rests_R: torch.Tensor
    rows_R: torch.Tensor

    @property
    def is_padded(self) -> bool:
        """Whether its sequences differ in length."""
        return len(self.rests_R) < self.real_NL.numel()

    @property
    def prefix_length(self) -> int:
        """The number of shared tokens that every sequence sees."""
        return self.prefix.stop - self.prefix.start


@dataclass(frozen=True)
class RowLayout:
    """The blocks of a row, and the position of every token in its own example.

    ``spans_N4`` has every sequence, the costliest first: its first token, its length, the first token and the length
    of the prefix that it sees. ``longest_seen`` is how many tokens the last one of a sequence sees at most.
    """

    blocks: tuple[Block, ...]
    positions_T: torch.Tensor
    spans_N4: torch.Tensor
    longest_seen: int

    @classmethod
    def make(cls, groups: Sequence[Group], device: torch.device) -> RowLayout:
        """Lay out the groups of a row."""
        blocks: list[Block] = []
        positions: list[torch.Tensor] = []
        sequences: list[tuple[int, int, int, int]] = []
        start = 0
        for group in groups:
            prefix = slice(start, start + group.prefix)
            if group.prefix:
                blocks.append(_block(slice(start, start), [(start, group.prefix)], device))
                positions.append(torch.arange(group.prefix))
                sequences.append((start, group.prefix, start, 0))
            start = prefix.stop
            spans = []
            for length in group.rest_lengths:
                spans.append((start, length))
                positions.append(group.prefix + torch.arange(length))
                sequences.append((start, length, prefix.start, group.prefix))
                start += length
            blocks += [_block(prefix, alike, device) for alike in _alike(spans)]
        sequences.sort(key=lambda sequence: -sequence[1] * (sequence[1] + sequence[3]))
        longest = max(length + prefix for _, length, _, prefix in sequences)
        return cls(tuple(blocks), torch.cat(positions).to(device), torch.tensor(sequences), longest)


def _alike(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield spans (start, length) of similar length together, so that little is padded."""
    found: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda span: -span[1]):
        if found and span[1] < SIMILAR * found[0][1]:
            yield found
            found = []
        found.append(span)
    if found:
        yield found


def _block(prefix: slice, spans: Sequence[tuple[int, int]], device: torch.device) -> Block:
    starts_N, lengths_N = torch.tensor(spans, device=device).T
    offsets_L = torch.arange(int(lengths_N.max()), device=device)
    real_NL = offsets_L[None] < lengths_N[:, None]
    gather_NL = torch.where(real_NL, starts_N[:, None] + offsets_L[None], 0)
    rests_R = real_NL.flatten().nonzero()[:, 0]
    return Block(prefix, gather_NL, real_NL, rests_R, gather_NL.flatten()[rests_R])
