"""Sample answers while training: greedy, all prompts together in rows, each token by a whole forward pass.

A handful of short answers is asked for, so a cache of keys is not worth its code here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import pack, shared_prefix
from luthier.templates.renderer import TokenizedExample

TOKENS_PER_ROW = 2048
ANY_TOKEN = 0


def answer_samples(
    model: RowModel, prompts: Sequence[Sequence[int]], stop_tokens: frozenset[int], limit: int
) -> list[list[int]]:
    """Return the greedy answer to each prompt, in tokens, without its stop token."""
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    while going:
        chosen = _next_tokens(model, [[*prompts[index], *answers[index]] for index in going])
        for index, token in zip(tuple(going), chosen, strict=True):
            if token not in stop_tokens:
                answers[index].append(token)
            if token in stop_tokens or len(answers[index]) == limit:
                going.remove(index)
    return answers


def _next_tokens(model: RowModel, texts: Sequence[Sequence[int]]) -> list[int]:
    examples = [
        TokenizedExample(str(index), [*text, ANY_TOKEN], [False] * len(text) + [True])
        for index, text in enumerate(texts)
    ]
    found = [ANY_TOKEN] * len(texts)
    with torch.no_grad():
        for row in pack(examples, shared_prefix(examples), TOKENS_PER_ROW):
            chosen = model.targets(row).chosen_M.tolist()
            for owner, token in zip(row.owners, chosen, strict=True):
                found[row.examples[owner]] = token
    return found
