"""Packs examples into rows: the arithmetic of it, without torch.

A row is what goes through a model at once: no padding, only real tokens. It holds one or more *groups*; a group is a
prefix that its members share, computed once, and behind it the rest of each member:

    prefix | rest of example 1 | rest of example 2 | … | prefix of the next group | …

A token sees its group's prefix and what stands before it in its own rest. See :mod:`luthier.llm.engine.row_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.templates.renderer import TokenizedExample


@dataclass(frozen=True)
class Group:
    """How many tokens a group's prefix has, and each of its rests, in the order of the row."""

    prefix: int
    rest_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Tokens that go through the model at once, and where loss falls.

    ``examples`` are indices of the examples in the order of their rests. ``targets`` are pairs (index in the row,
    token that the output there should predict); ``weights`` has one number per target; ``owners`` says which place
    in ``examples`` a target belongs to; ``ends`` is the index in the row of each example's last token.
    """

    examples: tuple[int, ...]
    tokens: list[int]
    groups: tuple[Group, ...]
    targets: list[tuple[int, int]]
    weights: list[float]
    owners: list[int]
    ends: list[int]


def places(row: Row) -> list[list[int]]:
    """Return the indices in a row of each example's tokens, those of its group's prefix first."""
    found: list[list[int]] = []
    start = 0
    for group in row.groups:
        prefix = range(start, start + group.prefix)
        start = prefix.stop
        for length in group.rest_lengths:
            found.append([*prefix, *range(start, start + length)])
            start += length
    return found


def shared_prefix(examples: Sequence[TokenizedExample]) -> int:
    """Return how many first tokens all examples share, none of them with loss, leaving each at least one token."""
    if not examples:
        return 0
    first = min(examples, key=lambda example: example.tokens).tokens
    last = max(examples, key=lambda example: example.tokens).tokens
    limit = min(_tokens_before_loss(example) for example in examples)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(0, min(length, limit))


def pack(examples: Sequence[TokenizedExample], tokens_per_row: int, *, share: bool = True) -> list[Row]:
    """Pack examples into rows of at most ``tokens_per_row`` tokens; with ``share`` a row has once what all begin with.

    An example that is longer gets a row of its own. First fit by decreasing length; the examples' order has no
    influence on the loss of their batch.
    """
    prefix = shared_prefix(examples) if share else 0
    sizes = [len(example.tokens) - prefix for example in examples]
    bins = _first_fit(sizes, tokens_per_row - prefix)
    return [_row(examples, [(members, prefix)]) for members in bins]


def pack_groups(
    examples: Sequence[TokenizedExample], groups: Sequence[Sequence[int]], tokens_per_row: int
) -> list[Row]:
    """Pack groups of examples, given by index, into rows; the members of a group share a prefix and stay together.

    A preference pair is such a group: the prompt is computed once for both of its answers.
    """
    prefixes = [shared_prefix([examples[index] for index in members]) for members in groups]
    sizes = [
        prefix + sum(len(examples[index].tokens) - prefix for index in members)
        for members, prefix in zip(groups, prefixes, strict=True)
    ]
    bins = _first_fit(sizes, tokens_per_row)
    return [_row(examples, [(groups[place], prefixes[place]) for place in places]) for places in bins]


def _tokens_before_loss(example: TokenizedExample) -> int:
    last = len(example.tokens) - 1
    return min(last, example.loss_mask.index(True) - 1) if True in example.loss_mask else last


def _first_fit(sizes: Sequence[int], room_per_bin: int) -> list[list[int]]:
    """Return bins of indices whose sizes sum to at most ``room_per_bin`` each, or hold one item that is larger."""
    bins: list[list[int]] = []
    # A tree over all bins there could be, each node with the most room below it: the first bin that has enough is found
    # in as many steps as the tree is high.
    leaves = 1 << (len(sizes) - 1).bit_length() if sizes else 1
    room = [room_per_bin] * (2 * leaves)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        node = leaves + len(bins) if sizes[index] > room_per_bin else 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < sizes[index])
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        room[node] -= sizes[index]
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def _row(examples: Sequence[TokenizedExample], groups: Sequence[tuple[Sequence[int], int]]) -> Row:
    row = Row((), [], (), [], [], [], [])
    members: list[int] = []
    for indices, prefix in groups:
        start = len(row.tokens)
        row.tokens.extend(examples[indices[0]].tokens[:prefix])
        for index in indices:
            _append(row, examples[index], place=len(members), prefix=prefix, group_start=start)
            members.append(index)
    lengths = [Group(prefix, tuple(len(examples[i].tokens) - prefix for i in indices)) for indices, prefix in groups]
    return Row(tuple(members), row.tokens, tuple(lengths), row.targets, row.weights, row.owners, row.ends)


def _append(row: Row, example: TokenizedExample, *, place: int, prefix: int, group_start: int) -> None:
    """Add an example's rest and its targets to a row; in the group's prefix it stands where the group starts."""
    shift = len(row.tokens) - prefix
    for position, (token, learned) in enumerate(zip(example.tokens, example.loss_mask, strict=True)):
        if learned and position > 0:
            # The first token of a rest is predicted from the prefix's last one, which all members share.
            source = position - 1
            row.targets.append((source + (group_start if source < prefix else shift), token))
            row.weights.append(example.weight)
            row.owners.append(place)
    row.tokens.extend(example.tokens[prefix:])
    row.ends.append(len(row.tokens) - 1)
