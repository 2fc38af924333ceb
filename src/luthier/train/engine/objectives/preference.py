"""Learning from pairs of answers: DPO, IPO, ORPO, and reward models. A pair's prompt is computed once for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from luthier.llm.engine.row_model import RowModel
from luthier.llm.rows import Row, pack_groups
from luthier.records.objectives import DpoOptions, OrpoOptions, RewardOptions
from luthier.templates.renderer import TokenizedExample, TokenizedPair
from luthier.train.engine.objectives.ids import IdIndex
from luthier.train.engine.objectives.objective import OnProgress, Part, PartLoss, sum_by_owner, total_weight
from luthier.train.engine.objectives.reference import Answers, load_or_compute

CERTAIN = 1e-7  # an answer whose tokens are likelier than exp of minus this has finite odds all the same


@dataclass(frozen=True)
class _PairRow:
    """A row of whole pairs: ``pairs`` are indices into the batch, in the order chosen, rejected, chosen, …"""

    row: Row
    pairs: list[int]


def _rows(units: Sequence[TokenizedPair], tokens_per_row: int) -> list[_PairRow]:
    sides = both_sides(units)
    groups = [(2 * index, 2 * index + 1) for index in range(len(units))]
    rows = pack_groups(sides, groups, tokens_per_row)
    return [_PairRow(row, [index // 2 for index in row.examples[::2]]) for row in rows]


def both_sides(units: Sequence[TokenizedPair]) -> list[TokenizedExample]:
    """Return chosen and rejected sides in turn."""
    return [side for unit in units for side in (unit.chosen, unit.rejected)]


def _weights(units: Sequence[TokenizedPair], pairs: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([units[index].weight for index in pairs], device=device)


def _summed(model: RowModel, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probabilities of the chosen and of the rejected answers of a row, each (pairs,)."""
    sums_N = sum_by_owner(model.targets(row).logprobs_M, row.owners, len(row.examples))
    return sums_N[::2], sums_N[1::2]


def _lengths(row: Row, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    lengths_N = torch.bincount(torch.tensor(row.owners), minlength=len(row.examples)).to(device)
    return lengths_N[::2], lengths_N[1::2]


def _reward_sums(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> dict[str, tuple[float, float]]:
    margin_P = (chosen_P - rejected_P).detach()
    count = float(len(margin_P))
    # A tie, as between two scores of an untrained head, is worth half a guess.
    right = float((margin_P > 0).sum()) + 0.5 * float((margin_P == 0).sum())
    return {
        "reward_accuracy": (right, count),
        "reward_margin": (float(margin_P.sum()), count),
        "chosen_reward": (float(chosen_P.detach().sum()), count),
        "rejected_reward": (float(rejected_P.detach().sum()), count),
    }


@dataclass
class Dpo:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7), and its IPO variant.

    With d = log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected): -log sigmoid(beta d); with label smoothing e
    (conservative DPO, Mitchell 2023) -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d). IPO (Azar et al. 2023,
    arXiv 2310.12036, equation 17) is (d - 1 / (2 beta))², its log-ratios taken per token.
    """

    model: RowModel
    options: DpoOptions
    tokens_per_row: int
    _index: IdIndex = field(default_factory=IdIndex)
    _reference_N2: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2))

    def prepare(self, units: Sequence[TokenizedPair], folder: Path, fingerprint: str, on_progress: OnProgress) -> None:
        """Ask the model, as it is before its first step, for every answer."""

        def answers(place: int) -> Answers:
            unit = units[place]
            return unit.chosen, unit.rejected

        tokens = self.tokens_per_row
        self._index = IdIndex(unit.example_id for unit in units)
        self._reference_N2 = load_or_compute(self.model, len(units), answers, tokens, folder, fingerprint, on_progress)

    def losses(self, units: Sequence[TokenizedPair], *, training: bool) -> list[Part]:
        """Return one part per row of pairs."""
        total = total_weight(unit.weight for unit in units)
        return [partial(self._part, units, part, total) for part in _rows(units, self.tokens_per_row)]

    def _part(self, units: Sequence[TokenizedPair], part: _PairRow, total: float) -> PartLoss:
        chosen_P, rejected_P = _summed(self.model, part.row)
        places_P = self._index.places([units[index].example_id for index in part.pairs])
        reference_P2 = self._reference_N2[places_P].to(chosen_P.device)
        chosen_P, rejected_P = chosen_P - reference_P2[:, 0], rejected_P - reference_P2[:, 1]
        losses_P = self._losses(chosen_P, rejected_P, part.row)
        loss = (losses_P * _weights(units, part.pairs, losses_P.device)).sum() / total
        return PartLoss(loss, _reward_sums(self.options.beta * chosen_P, self.options.beta * rejected_P))

    def _losses(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor, row: Row) -> torch.Tensor:
        beta, smoothing = self.options.beta, self.options.label_smoothing
        if self.options.loss == "ipo":
            chosen_lengths_P, rejected_lengths_P = _lengths(row, chosen_P.device)
            return (chosen_P / chosen_lengths_P - rejected_P / rejected_lengths_P - 1 / (2 * beta)).square()
        scaled_P = beta * (chosen_P - rejected_P)
        return -(1 - smoothing) * logsigmoid(scaled_P) - smoothing * logsigmoid(-scaled_P)


@dataclass
class Orpo:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7). No reference.

    The chosen answers' mean token loss, minus beta log sigmoid of the log odds ratio of chosen to rejected, where
    odds(p) = p / (1 - p) and p is the geometric mean probability of an answer's tokens.
    """

    model: RowModel
    options: OrpoOptions
    tokens_per_row: int

    def prepare(self, units: Sequence[TokenizedPair], folder: Path, fingerprint: str, on_progress: OnProgress) -> None:
        """Nothing stays the same here."""

    def losses(self, units: Sequence[TokenizedPair], *, training: bool) -> list[Part]:
        """Return one part per row of pairs."""
        learned = [self._with_prompt(unit) for unit in units] if self.options.learn_prompt else list(units)
        chosen_tokens = total_weight(sum(unit.chosen.loss_mask[1:]) * unit.weight for unit in learned)
        total = total_weight(unit.weight for unit in units)
        return [partial(self._part, units, part, chosen_tokens, total) for part in _rows(learned, self.tokens_per_row)]

    def _part(self, units: Sequence[TokenizedPair], part: _PairRow, chosen_tokens: float, total: float) -> PartLoss:
        found = self.model.targets(part.row)
        device = found.logprobs_M.device
        weights_P = _weights(units, part.pairs, device)
        answers_M = self._is_answer(units, part, device)
        chosen_P = sum_by_owner(found.logprobs_M, part.row.owners, len(part.row.examples))[::2]
        means_N = sum_by_owner(found.logprobs_M * answers_M, part.row.owners, len(part.row.examples))
        means_N = means_N / sum_by_owner(answers_M, part.row.owners, len(part.row.examples))
        odds_N = log_odds(means_N)
        ratio_P = logsigmoid(odds_N[::2] - odds_N[1::2])
        loss = -(weights_P * chosen_P).sum() / chosen_tokens
        loss = loss - self.options.beta * (weights_P * ratio_P).sum() / total
        return PartLoss(loss, _reward_sums(self.options.beta * means_N[::2], self.options.beta * means_N[1::2]))

    def _with_prompt(self, unit: TokenizedPair) -> TokenizedPair:
        chosen = unit.chosen
        whole = TokenizedExample(chosen.example_id, chosen.tokens, [True] * len(chosen.tokens), chosen.weight)
        return TokenizedPair(unit.example_id, whole, unit.rejected, unit.weight, unit.margin)

    def _is_answer(self, units: Sequence[TokenizedPair], part: _PairRow, device: torch.device) -> torch.Tensor:
        """Return 1 for targets of answers and 0 for those of prompts, (M,)."""
        sides = both_sides([units[index] for index in part.pairs])
        seen = [0] * len(sides)
        learned = [sum(side.loss_mask[1:]) for side in sides]
        totals = torch.bincount(torch.tensor(part.row.owners), minlength=len(sides)).tolist()
        found: list[float] = []
        for owner in part.row.owners:
            found.append(1.0 if seen[owner] >= totals[owner] - learned[owner] else 0.0)
            seen[owner] += 1
        return torch.tensor(found, device=device)


def log_odds(logprobs_N: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) from log p, without losing the digits of 1 - p where p is near 1."""
    return logprobs_N - torch.log(-torch.expm1(logprobs_N.clamp(max=-CERTAIN)))


@dataclass
class Reward:
    """A reward model: -log sigmoid(score(chosen) - score(rejected) - margin), after Bradley and Terry (1952).

    The margin is Llama 2's (Touvron et al. 2023, arXiv 2307.09288, equation 2); ``centre`` adds its multiple of
    (score(chosen) + score(rejected))² (Eisenstein et al. 2023, arXiv 2312.09244). Scores are read at the last token.
    """

    model: RowModel
    options: RewardOptions
    tokens_per_row: int

    def prepare(self, units: Sequence[TokenizedPair], folder: Path, fingerprint: str, on_progress: OnProgress) -> None:
        """Nothing stays the same here."""

    def losses(self, units: Sequence[TokenizedPair], *, training: bool) -> list[Part]:
        """Return one part per row of pairs."""
        total = total_weight(unit.weight for unit in units)
        return [partial(self._part, units, part, total) for part in _rows(units, self.tokens_per_row)]

    def _part(self, units: Sequence[TokenizedPair], part: _PairRow, total: float) -> PartLoss:
        scores_N = self.model.row_outputs(part.row)[:, 0]
        chosen_P, rejected_P = scores_N[::2], scores_N[1::2]
        margins_P = torch.tensor([units[index].margin for index in part.pairs], device=scores_N.device)
        losses_P = -logsigmoid(chosen_P - rejected_P - margins_P)
        losses_P = losses_P + self.options.centre * (chosen_P + rejected_P).square()
        loss = (losses_P * _weights(units, part.pairs, losses_P.device)).sum() / total
        return PartLoss(loss, _reward_sums(chosen_P, rejected_P))
