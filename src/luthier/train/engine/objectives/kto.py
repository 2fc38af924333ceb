"""Learning from thumbs: KTO (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import Row
from luthier.records.objectives import KtoOptions
from luthier.templates.renderer import TokenizedExample
from luthier.train.engine.objectives.ids import IdIndex
from luthier.train.engine.objectives.objective import OnProgress, Part, PartLoss, sum_by_owner, total_weight
from luthier.train.engine.objectives.reference import Answers, load_or_compute, summed_logprobs


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
    _others: _Mismatched = field(default_factory=lambda: _Mismatched([]))
    _reference_U2: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    def prepare(
        self, units: Sequence[TokenizedExample], folder: Path, fingerprint: str, on_progress: OnProgress
    ) -> None:
        """Ask the model, as it is before its first step, for every answer and every mismatched one."""
        self._others = others = _Mismatched(units)
        self._reference_U2 = load_or_compute(
            self.model, len(others.index), others.answers, self.tokens_per_row, folder, fingerprint, on_progress
        )

    def losses(self, units: Sequence[TokenizedExample], *, training: bool) -> list[Part]:
        """Return one part per row, after a pass without gradient over the mismatched answers."""
        drift = self._drift(units)
        total = total_weight(unit.weight for unit in units)
        rows = self.model.pack(units, self.tokens_per_row)
        return [partial(self._part, [units[index] for index in row.examples], row, drift, total) for row in rows]

    def _part(self, members: list[TokenizedExample], row: Row, drift: float, total: float) -> PartLoss:
        sums_N = sum_by_owner(self.model.targets(row).logprobs_M, row.owners, len(members))
        device = sums_N.device
        rewards_N = sums_N - self._of(members)[:, 0].to(device)
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
        now_N = summed_logprobs(self.model, self.model.pack(others, self.tokens_per_row), len(others))
        return max(0.0, float((now_N - self._of(units)[:, 1]).mean()))

    def _of(self, units: Sequence[TokenizedExample]) -> torch.Tensor:
        """Return the reference of units, (N, 2): of their own answers and of the mismatched ones."""
        return self._reference_U2[self._others.index.numbers([unit.example_id for unit in units])]


class _Mismatched:
    """Units with an answer that belongs to another prompt, made of two of them when it is asked for.

    That answer is of the nearest unit before it (before the first: the last) that has another prompt. ``index`` tells
    units apart: some may be there several times.
    """

    def __init__(self, units: Sequence[TokenizedExample]) -> None:
        self._units = units
        self.index = IdIndex(unit.example_id for unit in units)
        places_U = self.index.places_U
        prompts = (_prompt(units[place]) for place in chain(places_U[-1:], places_U))
        self._other_places_U = places_U[_numbers_of_others(prompts)]

    def __getitem__(self, example_id: str) -> TokenizedExample:
        return self.answers(int(self.index.numbers([example_id])[0]))[1]

    def answers(self, number: int) -> Answers:
        """Return the unit of an id, by its number, with its own answer and with the other one."""
        unit, other = (self._units[places_U[number]] for places_U in (self.index.places_U, self._other_places_U))
        return unit, _with_answer_of(unit, other)


def _sums(rewards_N: torch.Tensor, liked_N: torch.Tensor, drift: float) -> dict[str, tuple[float, float]]:
    right = ((rewards_N > 0) == liked_N).float() + 0.5 * (rewards_N == 0).float() * (1 - 2 * (~liked_N).float())
    return {
        "thumb_accuracy": (float(right.sum()), float(len(liked_N))),
        "liked_reward": (float(rewards_N[liked_N].sum()), float(liked_N.sum())),
        "disliked_reward": (float(rewards_N[~liked_N].sum()), float((~liked_N).sum())),
        "drift": (drift * len(liked_N), float(len(liked_N))),
    }


def _numbers_of_others(prompts: Iterable[list[int]]) -> np.ndarray[Any, Any]:
    """Return for each unit the number of the one whose answer it gets, -1 for the last; ``prompts`` start with its own.

    Neighbours may have one prompt: both answers to it, say. All of them are given the answer before the first.
    """
    changes_U = np.fromiter((before != prompt for before, prompt in pairwise(prompts)), np.bool_)
    if not changes_U.any():
        return np.arange(len(changes_U)) - 1
    changes = np.flatnonzero(changes_U)
    return changes[np.cumsum(changes_U) - 1] - 1  # before the first change: those behind the last one go on


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
