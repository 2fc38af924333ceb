"""Scores given answers under a model in torch: perplexity for evaluations, the reference for parity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.evaluate.parity import ScoredAnswer
from luthier.llm.engine.row_model import RowModel, score_examples
from luthier.llm.engine.torch_model import DTYPES, Precision, load_base, load_with_adapter, roomy_device
from luthier.templates.renderer import TokenizedExample

Tokens = Sequence[int]


class Scorer:
    """A base model, with an adapter where one is given, that scores answers instead of giving them.

    It computes in ``precision``, on the GPU where that has room. Narrower numbers are float32 numbers too: where the
    layers can take them as they are, they are held as in the files, in half the memory.
    """

    def __init__(self, base_folder: Path, adapter_folder: Path | None = None, precision: Precision = "float32") -> None:
        held = None if precision == "float32" else precision
        here = roomy_device(base_folder)
        if adapter_folder:
            model = load_with_adapter(base_folder, adapter_folder, held, on=here)
        else:
            model = load_base(base_folder, held, on=here)
        self._model = RowModel(model, DTYPES[precision])
        if held is None and not self._model.is_fused:
            model.float()

    def score(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[ScoredAnswer]:
        """Return, for each answer (tokens) behind its prompt (tokens), what the model would choose at each place."""
        examples = [
            TokenizedExample(str(index), [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        scored: dict[int, ScoredAnswer] = {}
        for index, targets in score_examples(self._model, examples):
            scored[index] = ScoredAnswer([t.chosen for t in targets], [t.logprob for t in targets])
        return [scored[index] for index in range(len(examples))]
