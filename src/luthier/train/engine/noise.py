"""Noise on the embeddings while training (NEFTune): Jain et al. 2023, arXiv 2310.05914.

Names end in their dimensions: T tokens of a row, W model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from luthier.llm.rows import Group


def neftune(embeddings_TW: torch.Tensor, alpha: float, lengths_T: torch.Tensor) -> torch.Tensor:
    """Return embeddings (…, T, W) with uniform noise in [-1, 1] times alpha / sqrt(length * W) added (algorithm 1).

    ``lengths_T`` is for every token the number of tokens of its example. The noise is drawn in float32 from torch's
    global generator on the processor, wherever the model is: that state is in every checkpoint, so a run that goes on
    sees the noise it would have seen, and every device sees the same.
    """
    if alpha == 0:
        return embeddings_TW
    noise_TW = torch.rand(embeddings_TW.shape).mul_(2).sub_(1)
    scale_T = alpha / (lengths_T.cpu().float() * embeddings_TW.shape[-1]).sqrt()
    return embeddings_TW + (noise_TW * scale_T[:, None]).to(embeddings_TW)


def example_lengths(groups: Sequence[Group]) -> torch.Tensor:
    """Return for every token of a row the length in tokens of its example, float32 (T,).

    The tokens of a prefix belong to several examples; they get the mean of their lengths.
    """
    lengths: list[float] = []
    for group in groups:
        mean = group.prefix + math.fsum(group.rest_lengths) / max(1, len(group.rest_lengths))
        lengths += [mean] * group.prefix
        for rest in group.rest_lengths:
            lengths += [float(group.prefix + rest)] * rest
    return torch.tensor(lengths)
