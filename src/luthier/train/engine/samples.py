"""Sample answers while training: greedy, by transformers' own generation, which keeps the keys of what is behind it.

Prompts of similar length are answered together; each prompt goes through the model once, then each token by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from luthier.llm.engine.row_attention import ATTENTION_NAME
from luthier.llm.engine.row_model import RowModel, autocast
from luthier.llm.engine.text_batches import by_length

TOKENS_AT_ONCE = 2048
ANY_TOKEN = 0  # stands before a prompt that is shorter, and behind an answer; neither is looked at


def answer_samples(
    model: RowModel, prompts: Sequence[Sequence[int]], stop_tokens: frozenset[int], limit: int
) -> list[list[int]]:
    """Return the greedy answer to each prompt, in tokens, without its stop token."""
    answers: list[list[int]] = [[] for _ in prompts]
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=sorted(stop_tokens) or None, pad_token_id=ANY_TOKEN
    )
    with _generating(model) as generator, torch.no_grad(), autocast(model.dtype, model.device):
        for indices in by_length([len(prompt) for prompt in prompts], TOKENS_AT_ONCE):
            longest = max(len(prompts[index]) for index in indices)
            before = [longest - len(prompts[index]) for index in indices]
            tokens = [[ANY_TOKEN] * left + list(prompts[index]) for left, index in zip(before, indices, strict=True)]
            written = generator.generate(
                input_ids=torch.tensor(tokens, device=model.device),
                attention_mask=torch.tensor([[0] * left + [1] * (longest - left) for left in before]).to(model.device),
                generation_config=settings,
            )
            for index, row in zip(indices, written[:, longest:].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in stop_tokens), len(row))
                answers[index] = row[:end]
    return answers


@contextmanager
def _generating(model: RowModel) -> Iterator[Any]:
    """Lend the model to transformers: with an attention that knows a cache, and with no habits of the base's own."""
    inner = model.model.get_base_model() if hasattr(model.model, "get_base_model") else model.model
    attention, habits = inner.config._attn_implementation, inner.generation_config
    if attention == ATTENTION_NAME:
        inner.set_attn_implementation("sdpa")
    inner.generation_config = GenerationConfig()
    try:
        yield inner
    finally:
        inner.generation_config = habits
        inner.set_attn_implementation(attention)
