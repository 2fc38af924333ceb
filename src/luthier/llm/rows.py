"""Packs examples into rows that share their common prefix: the arithmetic of it, without torch.

See :mod:`luthier.llm.engine.prefix_attention` for what a row is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.templates.renderer import TokenizedExample


@dataclass(frozen=True)
class Row:
    """A row: the shared prefix, the rest of each example, and where loss falls.

    ``targets`` are pairs (index in the row, token that the output there should predict); ``weights`` one number
    per target; ``owners`` says which of ``examples`` a target belongs to.
    """

    examples: tuple[int, ...]
    tokens: list[int]
    prefix: int
    rest_lengths: list[int]
    targets: list[tuple[int, int]]
    weights: list[float]
    owners: list[int]


def shared_prefix(examples: Sequence[TokenizedExample]) -> int:
    """Return how many first tokens all examples share, none of them with loss, leaving each at least one token."""
    if not examples:
        return 0
    first = min(examples, key=lambda example: example.tokens).tokens
    last = max(examples, key=lambda example: example.tokens).tokens
    limit = min(min(len(example.tokens) - 1, example.loss_mask.index(True) - 1) for example in examples)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(0, min(length, limit))


def pack(examples: Sequence[TokenizedExample], prefix: int, tokens_per_row: int) -> list[Row]:
    """Pack examples into rows of at most ``tokens_per_row`` tokens (a longer example gets a row of its own).

    First-fit by decreasing length; within a row examples of similar length stand together, which keeps the padding
    inside attention small. The examples' order has no influence on the loss of their batch.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens)):
        size = len(examples[index].tokens) - prefix
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            bins.append([index])
            room.append(tokens_per_row - prefix - size)
        else:
            bins[place].append(index)
            room[place] -= size
    return [_row(examples, members, prefix) for members in bins]


def computed_tokens(examples: Sequence[TokenizedExample], prefix: int, tokens_per_row: int, batch_size: int) -> int:
    """Return how many tokens go through the model for these examples, packed batch by batch."""
    batches = (examples[first : first + batch_size] for first in range(0, len(examples), batch_size))
    return sum(len(row.tokens) for batch in batches for row in pack(batch, prefix, tokens_per_row))


def _row(examples: Sequence[TokenizedExample], members: list[int], prefix: int) -> Row:
    tokens = list(examples[members[0]].tokens[:prefix])
    targets: list[tuple[int, int]] = []
    weights: list[float] = []
    owners: list[int] = []
    lengths: list[int] = []
    for place, index in enumerate(members):
        example = examples[index]
        shift = len(tokens) - prefix
        for position, (token, learned) in enumerate(zip(example.tokens, example.loss_mask, strict=True)):
            if learned and position > 0:
                # The first token of a rest is predicted from the prefix's last one, which all examples share.
                source = position - 1
                targets.append((source if source < prefix else source + shift, token))
                weights.append(example.weight)
                owners.append(place)
        tokens += example.tokens[prefix:]
        lengths.append(len(example.tokens) - prefix)
    return Row(tuple(members), tokens, prefix, lengths, targets, weights, owners)
