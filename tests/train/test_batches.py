"""A batch gives the same loss and gradient however it is cut into rows, and is the weighted mean of its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exactness import adapter, assert_agree, gradients, nothing, ours, perturb, perturbed
from transformers import AutoModelForSequenceClassification

from luthier.llm.engine.encoder_model import EncoderModel
from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import load_base
from luthier.records.objectives import DpoOptions, KtoOptions, OrpoOptions, RewardOptions, SupervisedOptions
from luthier.templates.renderer import TokenizedExample, TokenizedPair
from luthier.train.engine.objectives.kto import Kto
from luthier.train.engine.objectives.labelled import Labelled
from luthier.train.engine.objectives.preference import Dpo, Orpo, Reward
from luthier.train.engine.objectives.supervised import Supervised
from luthier.train.engine.optimizers import make_optimizer, parameter_groups

WIDE, MIDDLE, NARROW = 4096, 64, 8
WEIGHTS = (1.0, 0.25, 3.0, 0.0, 2.0)
TOKENS = 110  # of every base here at the least
METHODS = ("supervised", "dpo", "ipo", "orpo", "orpo_with_prompt", "kto", "reward")


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(5, TOKENS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def example(index: int, answer: int, seed: int) -> TokenizedExample:
    """Return an example that shares its first tokens with all others, and its whole prompt with the same index."""
    prompt = [1, 7, 8, 9, *tokens(4 + 3 * index, index)]
    mask = [False] * len(prompt) + [True] * answer
    return TokenizedExample(str(index), [*prompt, *tokens(answer, 100 + seed)], mask, WEIGHTS[index], float(index % 2))


def singles() -> list[TokenizedExample]:
    return [example(index, 3 + 2 * index, index) for index in range(len(WEIGHTS))]


def pairs() -> list[TokenizedPair]:
    return [
        TokenizedPair(
            str(index), example(index, 3 + 2 * index, index), example(index, 9 - index, 50 + index), weight, 0.5
        )
        for index, weight in enumerate(WEIGHTS)
    ]


def texts() -> list[TokenizedExample]:
    return [replace(unit, loss_mask=[False] * len(unit.tokens)) for unit in singles()]


def make(method: str, model: Any, tokens_per_row: int = WIDE) -> Any:
    rows = RowModel(model)
    objectives = {
        "supervised": lambda: Supervised(rows, SupervisedOptions(), tokens_per_row),
        "dpo": lambda: Dpo(rows, DpoOptions(beta=0.3), tokens_per_row),
        "ipo": lambda: Dpo(rows, DpoOptions(loss="ipo"), tokens_per_row),
        "orpo": lambda: Orpo(rows, OrpoOptions(beta=0.4), tokens_per_row),
        "orpo_with_prompt": lambda: Orpo(rows, OrpoOptions(beta=0.4, learn_prompt=True), tokens_per_row),
        "kto": lambda: Kto(rows, KtoOptions(beta=0.3, desirable_weight=1.5, undesirable_weight=1.0), tokens_per_row),
        "reward": lambda: Reward(rows, RewardOptions(centre=0.1), tokens_per_row),
    }
    return objectives[method]()


def prepared(method: str, tiny_base: Path, folder: Path) -> tuple[Any, list[Any], Any]:
    """Return an objective that has its reference, the units of its batch, and its model some steps later."""
    units: list[Any] = singles() if method in ("supervised", "kto") else pairs()
    model = scorer(tiny_base) if method == "reward" else perturbed(adapter(load_base(tiny_base, "float32")), 1)
    objective = make(method, model)
    objective.prepare(units, folder, "one", nothing)
    perturb(model, 2)
    return objective, units, model


def scorer(folder: Path, outputs: int = 1) -> Any:
    torch.manual_seed(0)
    model = load_base(folder, "float32", kind=AutoModelForSequenceClassification, num_labels=outputs)
    return perturbed(adapter(model, "SEQ_CLS"), 1)


@pytest.mark.parametrize("method", METHODS)
def test_parts_add_up_to_the_whole_batch(tiny_base: Path, tmp_path: Path, method: str) -> None:
    objective, units, model = prepared(method, tiny_base, tmp_path)
    whole = ours(objective, units, model)
    for tokens_per_row in (MIDDLE, NARROW):
        smaller = replace(objective, tokens_per_row=tokens_per_row)
        assert len(smaller.losses(units, training=True)) > 1
        assert_agree(ours(smaller, units, model), whole)


def test_the_optimizer_moves_every_weight_against_its_gradient(tiny_base: Path, tmp_path: Path) -> None:
    # A fused optimizer reads a gradient as it lies in memory: a view of a larger one is other numbers to it.
    objective, units, model = prepared("supervised", tiny_base, tmp_path)
    _, wanted = ours(replace(objective, tokens_per_row=NARROW), units, model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_optimizer("adamw", parameter_groups(model, 1e-3, 0.0)).step()
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    for name, gradient in wanted.items():
        learned = gradient.abs() > 1e-7
        assert learned.any()
        assert torch.equal(moved[name][learned].sign(), -gradient[learned].sign()), name


@pytest.mark.parametrize("method", ["supervised", "dpo", "ipo", "reward"])
def test_a_batch_is_the_weighted_mean_of_its_units_one_at_a_time(tiny_base: Path, tmp_path: Path, method: str) -> None:
    objective, units, model = prepared(method, tiny_base, tmp_path)
    shares = [unit.weight * (sum(unit.loss_mask) if method == "supervised" else 1) for unit in units]
    loss, sums = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for unit, share in zip(units, shares, strict=True):
        one = ours(objective, [unit], model)
        loss += one[0] * share / sum(shares)
        for name, gradient in one[1].items():
            sums[name] += gradient * share / sum(shares)
    assert_agree(ours(objective, units, model), (loss, sums))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_whose_weights_are_all_0_teaches_nothing(tiny_base: Path, tmp_path: Path, method: str) -> None:
    objective, units, model = prepared(method, tiny_base, tmp_path)
    loss, found = ours(objective, units[3:4], model)
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


def test_orpo_without_the_prompt_is_the_formula_of_the_paper(tiny_base: Path, tmp_path: Path) -> None:
    objective, units, model = prepared("orpo", tiny_base, tmp_path)
    total, learned = torch.zeros(()), sum(unit.weight * sum(unit.chosen.loss_mask) for unit in units)
    for unit in units:
        sums, means = zip(*(summed(model, side) for side in (unit.chosen, unit.rejected)), strict=True)
        odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        ratio = torch.nn.functional.logsigmoid(odds[0] - odds[1])
        total = total - unit.weight * (sums[0] / learned + 0.4 * ratio / sum(WEIGHTS))
    model.zero_grad()
    total.backward()
    expected = (float(total.detach()), gradients(model))
    assert_agree(ours(objective, units, model), expected)


def summed(model: Any, side: TokenizedExample) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum and mean of an answer's log-probabilities, by transformers alone."""
    logprobs = model(input_ids=torch.tensor([side.tokens])).logits[0, :-1].log_softmax(-1)
    places = torch.tensor([place for place, learned in enumerate(side.loss_mask) if learned])
    found = logprobs[places - 1, torch.tensor(side.tokens)[places]]
    return found.sum(), found.mean()


def test_kto_estimates_its_drift_with_answers_to_other_prompts(tiny_base: Path, tmp_path: Path) -> None:
    """Also where an example is there several times, as after resampling, or both answers to a prompt are."""
    first, second, third = (example(index, 4, index) for index in range(3))
    other = replace(example(1, 4, 60), example_id="1b")
    objective = Kto(RowModel(load_base(tiny_base, "float32")), KtoOptions(), WIDE)
    objective.prepare([first, first, second, other, other, third, third], tmp_path, "one", nothing)
    answers = {unit.example_id: other_answer(objective, unit) for unit in (first, second, other, third)}
    assert answers == {
        first.example_id: third.tokens[-4:],
        second.example_id: first.tokens[-4:],
        other.example_id: first.tokens[-4:],
        third.example_id: other.tokens[-4:],
    }


def other_answer(objective: Kto, unit: TokenizedExample) -> list[int]:
    return objective._others[unit.example_id].tokens[-4:]


@pytest.mark.parametrize("prompts", [1, 2, 3, 12])
def test_kto_takes_the_nearest_other_prompt_before_or_else_the_last(
    tiny_base: Path, tmp_path: Path, prompts: int
) -> None:
    chosen = torch.randint(0, prompts, (24,), generator=torch.Generator().manual_seed(prompts)).tolist()
    units = [
        TokenizedExample(str(index), [1, 20 + prompt, *tokens(4, index)], [False, False, *[True] * 4])
        for index, prompt in enumerate(chosen)
    ]
    objective = Kto(RowModel(load_base(tiny_base, "float32")), KtoOptions(), WIDE)
    objective.prepare(units, tmp_path, "one", nothing)
    for index, unit in enumerate(units):
        before = [*units[:index][::-1], *units[index:][::-1]]
        # Where nothing else is asked, the answer is the neighbour's.
        nearest = next((one for one in before if one.tokens[1] != unit.tokens[1]), units[index - 1])
        assert other_answer(objective, unit) == nearest.tokens[-4:]


# Labels and numbers


def plain_loss(model: Any, units: Sequence[TokenizedExample], *, classes: bool) -> torch.Tensor:
    """Return transformers' own loss of a padded batch."""
    longest = max(len(unit.tokens) for unit in units)
    padded = torch.tensor([unit.tokens + [0] * (longest - len(unit.tokens)) for unit in units])
    mask = torch.tensor([[1] * len(unit.tokens) + [0] * (longest - len(unit.tokens)) for unit in units])
    labels = torch.tensor([unit.label for unit in units])
    found: torch.Tensor = model(input_ids=padded, attention_mask=mask, labels=labels.long() if classes else labels).loss
    return found


@pytest.mark.parametrize("method", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_base"])
def test_labels_are_learned_with_the_loss_of_transformers(kind: str, method: str, request: Any) -> None:
    folder, classes = request.getfixturevalue(kind), method == "classification"
    units = [
        replace(unit, weight=1.0, label=unit.label if classes else index / 3) for index, unit in enumerate(texts())
    ]
    model = scorer(folder, 3 if classes else 1)
    if kind == "tiny_base":
        model.get_base_model().config.pad_token_id = 0
    loss = plain_loss(model, units, classes=classes)
    model.zero_grad()
    loss.backward()
    expected = (float(loss.detach()), gradients(model))
    asked = EncoderModel(model) if kind == "tiny_encoder" else RowModel(model)
    for tokens_per_row in (WIDE, MIDDLE, NARROW):
        assert_agree(ours(Labelled(asked, method, tokens_per_row), units, model), expected)


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_base"])
def test_labels_are_weighted_as_their_texts_are(kind: str, request: Any) -> None:
    units, model = texts(), scorer(request.getfixturevalue(kind), 2)
    objective = Labelled(EncoderModel(model) if kind == "tiny_encoder" else RowModel(model), "classification", MIDDLE)
    loss, sums = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for unit in units:
        one = ours(objective, [replace(unit, weight=1.0)], model)
        loss += one[0] * unit.weight / sum(WEIGHTS)
        for name, gradient in one[1].items():
            sums[name] += gradient * unit.weight / sum(WEIGHTS)
    assert_agree(ours(objective, units, model), (loss, sums))
