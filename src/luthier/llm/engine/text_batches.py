"""Texts in batches of similar length, padded: how encoders are asked, and decoders that take no rows.

Names end in their dimensions: N texts, L tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SIMILAR = 1.3
ENOUGH_TOKENS = 192


def padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts as tokens (N, L), and which of them are real: 1, or 0 for padding (N, L)."""
    lengths_N = torch.tensor([len(text) for text in texts])
    tokens_NL = torch.zeros(len(texts), int(lengths_N.max()), dtype=torch.long)
    for row, text in enumerate(texts):
        tokens_NL[row, : len(text)] = torch.tensor(text)
    real_NL = (torch.arange(tokens_NL.shape[1])[None] < lengths_N[:, None]).long()
    return tokens_NL, real_NL


def by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Return indices in batches of similar length: padded, a batch has at most ``tokens_per_batch`` tokens.

    A batch that has enough tokens to keep the kernels busy takes no text that is much longer than its shortest.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        length = lengths[index]
        fits = bool(batches) and (len(batches[-1]) + 1) * length <= tokens_per_batch
        if fits and (
            length <= SIMILAR * lengths[batches[-1][0]] or len(batches[-1]) * lengths[batches[-1][-1]] < ENOUGH_TOKENS
        ):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
