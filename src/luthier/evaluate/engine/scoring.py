"""Scores given answers under a model in torch: perplexity for evaluations, the reference for parity."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from luthier.evaluate.parity import ScoredAnswer
from luthier.llm.engine.row_forward import score_examples
from luthier.llm.engine.torch_model import Precision, load_base, load_with_adapter
from luthier.templates.renderer import TokenizedExample


def score_answers(
    base_folder: Path,
    adapter_folder: Path | None,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    precision: Precision = "float32",
) -> list[ScoredAnswer]:
    """Score answers (tokens) behind prompts (tokens) under a base model, with an adapter where one is given."""
    if adapter_folder:
        model = load_with_adapter(base_folder, adapter_folder, precision)
    else:
        model = load_base(base_folder, precision)
    examples = [
        TokenizedExample(str(index), [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    scored: dict[int, ScoredAnswer] = {}
    for index, targets in score_examples(model, examples):
        scored[index] = ScoredAnswer([t.chosen for t in targets], [t.logprob for t in targets])
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [scored[index] for index in range(len(examples))]
