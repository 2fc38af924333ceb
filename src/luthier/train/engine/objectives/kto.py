"""Learning from thumbs: KTO (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import Row, pack
from luthier.records.objectives import KtoOptions
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.objectives.objective import OnProgress, Part, PartLoss, sum_by_owner, total_weight
from luthier.train.engine.objectives.reference import load_or_compute, summed_logprobs


@dataclass
class Kto:
    """Kahneman-Tversky optimisation (equation 8): 1 - sigmoid(beta (r - z)) if liked, 1 - sigmoid(beta (z - r)) if not.

    r = log pi(answer) / ref(answer). z estimates how far the model has moved at all: the batch's mean, at least 0, of
    r for answers that belong to another prompt (each is given the nearest one before it in the data), without gradient.
    The options' weights are numbers: a plan has made them so.
    """

    model: RowModel
    options: KtoOptions
    tokens_per_row: int
    _reference: dict[str, float] = field(default_factory=dict)
    _other_reference: dict[str, float] = field(default_factory=dict)
    _others: dict[str, TokenizedExample] = field(default_factory=dict)

    def prepare(
        self, units: Iterable[TokenizedExample], folder: Path, fingerprint: str, on_progress: OnProgress
    ) -> None:
        """Ask the model, as it is before its first step, for every answer and every mismatched one."""
        units = list({unit.example_id: unit for unit in units}.values())  # some may be there several times
        others = [_with_answer_of(unit, other) for unit, other in zip(units, _mismatched(units), strict=True)]
        examples = [*units, *others]
        groups = [(index, len(units) + index) for index in range(len(units))]
        found = load_or_compute(self.model, examples, groups, self.tokens_per_row, folder, fingerprint, on_progress)
        for index, (unit, other) in enumerate(zip(units, others, strict=True)):
            self._reference[unit.example_id] = float(found[index])
            self._other_reference[unit.example_id] = float(found[len(units) + index])
            self._others[unit.example_id] = other

    def losses(self, units: Sequence[TokenizedExample], *, training: bool) -> list[Part]:
        """Return one part per row, after a pass without gradient over the mismatched answers."""
        drift = self._drift(units)
        total = total_weight(unit.weight for unit in units)
        rows = pack(units, 0, self.tokens_per_row)
        return [partial(self._part, [units[index] for index in row.examples], row, drift, total) for row in rows]

    def _part(self, members: list[TokenizedExample], row: Row, drift: float, total: float) -> PartLoss:
        sums_N = sum_by_owner(self.model.targets(row).logprobs_M, row.owners, len(members))
        device = sums_N.device
        rewards_N = sums_N - torch.tensor([self._reference[unit.example_id] for unit in members], device=device)
        liked_N = torch.tensor([unit.label == 1.0 for unit in members], device=device)
        direction_N = torch.where(liked_N, 1.0, -1.0)
        losses_N = 1 - torch.sigmoid(self.options.beta * direction_N * (rewards_N - drift))
        up, down = float(self.options.desirable_weight), float(self.options.undesirable_weight)
        weights_N = torch.where(liked_N, up, down)
        weights_N = weights_N * torch.tensor([unit.weight for unit in members], device=device)
        scaled_N = self.options.beta * rewards_N.detach()
        return PartLoss((losses_N * weights_N).sum() / total, _sums(scaled_N, liked_N, drift))

    def _drift(self, units: Sequence[TokenizedExample]) -> float:
        others = [self._others[unit.example_id] for unit in units]
        groups = [(index,) for index in range(len(others))]
        now_N = summed_logprobs(self.model, others, groups, self.tokens_per_row)
        before_N = torch.tensor([self._other_reference[unit.example_id] for unit in units])
        return max(0.0, float((now_N - before_N).mean()))


def _sums(rewards_N: torch.Tensor, liked_N: torch.Tensor, drift: float) -> dict[str, tuple[float, float]]:
    right = ((rewards_N > 0) == liked_N).float() + 0.5 * (rewards_N == 0).float() * (1 - 2 * (~liked_N).float())
    return {
        "thumb_accuracy": (float(right.sum()), float(len(liked_N))),
        "liked_reward": (float(rewards_N[liked_N].sum()), float(liked_N.sum())),
        "disliked_reward": (float(rewards_N[~liked_N].sum()), float((~liked_N).sum())),
        "drift": (drift * len(liked_N), float(len(liked_N))),
    }


def _mismatched(units: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Return for each unit the nearest one before it (before the first: the last) that has another prompt."""
    prompts = [_prompt(unit) for unit in units]
    # Neighbours may have one prompt: both answers to it, say. All of them are given the answer before the first.
    changes = [index for index in range(len(units)) if prompts[index] != prompts[index - 1]]
    found = [units[index - 1] for index in range(len(units))]
    for first, end in zip(changes, [*changes[1:], len(units) + changes[0]] if changes else [], strict=True):
        for index in range(first, end):
            found[index % len(units)] = units[first - 1]
    return found


def _prompt(unit: TokenizedExample) -> list[int]:
    return unit.tokens[: unit.loss_mask.index(True)]


def _with_answer_of(unit: TokenizedExample, other: TokenizedExample) -> TokenizedExample:
    """Return a unit's prompt with another one's answer, no longer than the longer of the two."""
    prompt = _prompt(unit)
    answer = other.tokens[other.loss_mask.index(True) :]
    limit = max(len(unit.tokens), len(other.tokens))
    answer = answer[: max(1, limit - len(prompt))]
    mask = [False] * len(prompt) + [True] * len(answer)
    return TokenizedExample(f"{unit.example_id}~", [*prompt, *answer], mask)
