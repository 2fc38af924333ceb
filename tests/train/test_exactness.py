"""Losses and gradients are those of TRL 1.16 and of plain transformers, in float32, to a relative 1e-5.

TRL's trainers are really made: they tokenise the data, collate a batch, and compute its loss on a padded model of their
own with the same weights. Our units are made of their tokens, and go through the model packed into rows. What TRL does
otherwise is said where it is. It takes seconds to import, so only the tests that need it do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from luthier.llm.engine.row_model import RowModel
from luthier.llm.engine.torch_model import load_base
from luthier.records.objectives import DpoOptions, KtoOptions, OrpoOptions, RewardOptions, SupervisedOptions
from luthier.templates.renderer import TokenizedExample, TokenizedPair, Unit
from luthier.train.engine.objectives.kto import Kto
from luthier.train.engine.objectives.objective import Objective
from luthier.train.engine.objectives.preference import Dpo, Orpo, Reward, log_odds
from luthier.train.engine.objectives.supervised import Supervised

TOLERANCE = 1e-5
WIDE, NARROW = 4096, 8  # tokens per row: the whole batch in one, or each unit in a row of its own

PAIRS = [
    ("Say hello to the world.", " hello world", " no"),
    ("How are you today?", " Thank you very much, I am well today!", " maybe"),
    ("Please help me with my order.", " yes", " no, the lazy dog jumps over the quick brown fox"),
    ("Classify the message.", " positive", " negative or neutral, 1 2 3 4 5"),
    ("Build an instrument.", " A luthier builds and tunes instruments.", " good morning"),
]
Outcome = tuple[float, dict[str, torch.Tensor]]


def adapter(model: Any, task: str = "CAUSAL_LM") -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task))


def perturb(model: Any, seed: int, size: float = 0.05) -> None:
    """Move what is trained, by the same for the same seed, whatever else the model has."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def our_model(folder: Path, *, full: bool = False) -> Any:
    model = load_base(folder, "float32")
    return perturbed(model if full else adapter(model), 1)


def plain_model(folder: Path, *, full: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return perturbed(model if full else adapter(model), 1)


def scorer(folder: Path, load: Callable[..., Any], **options: Any) -> Any:
    torch.manual_seed(2)  # of the head
    return perturbed(adapter(load(folder, num_labels=1, **options), "SEQ_CLS"), 1)


def perturbed(model: Any, seed: int) -> Any:
    perturb(model, seed)
    return model.eval()


def ours(objective: Objective, units: Sequence[Unit], model: Any, *, training: bool = True) -> Outcome:
    """Return the loss of a batch and its gradients, part by part as the loop does it."""
    model.zero_grad()
    loss = 0.0
    for part in objective.losses(units, training=training):
        found = part()
        found.loss.backward()
        loss += float(found.loss.detach())
    return loss, gradients(model)


def agree(objective: Any, units: Sequence[Unit], model: Any, expected: Outcome) -> None:
    """Ask for the whole batch in one row, and for each unit in a row of its own."""
    for tokens_per_row in (WIDE, NARROW):
        assert_agree(ours(replace(objective, tokens_per_row=tokens_per_row), units, model), expected)


def theirs(trainer: Any, rows: Sequence[dict[str, Any]]) -> Outcome:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(rows)))
    loss.backward()
    return float(loss.detach()), gradients(trainer.model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_agree(found: Outcome, expected: Outcome) -> None:
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    difference, whole = (
        torch.cat([values[name].flatten() for name in sorted(values)])
        for values in ({name: found[1][name] - gradient for name, gradient in expected[1].items()}, expected[1])
    )
    assert float(whole.norm()) > 0
    assert float(difference.norm()) <= TOLERANCE * float(whole.norm())


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(PAIRS),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **more,
    }


def dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def pair_rows() -> list[dict[str, Any]]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]


def side(name: str, prompt: list[int], answer: list[int]) -> TokenizedExample:
    return TokenizedExample(name, [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def pair(index: int, row: dict[str, Any]) -> TokenizedPair:
    sides = (side(str(index), row["prompt_ids"], row[f"{kind}_ids"]) for kind in ("chosen", "rejected"))
    return TokenizedPair(str(index), *sides)


def nothing(what: str, share: float) -> None:
    """Hear of progress."""


# Supervised


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_supervised_is_sft_of_trl(tiny_base: Path, tmp_path: Path, full: bool, smoothing: float) -> None:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=plain_model(tiny_base, full=full),
        args=SFTConfig(**settings(tmp_path, label_smoothing_factor=smoothing)),
        train_dataset=dataset([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows()]),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    rows = list(trainer.train_dataset)
    units = [
        TokenizedExample(str(index), row["input_ids"], [label != -100 for label in row["labels"]])
        for index, row in enumerate(rows)
    ]
    model = our_model(tiny_base, full=full)
    objective = Supervised(RowModel(model), SupervisedOptions(label_smoothing=smoothing), WIDE)
    agree(objective, units, model, theirs(trainer, rows))
    agree(objective, units[:1], model, theirs(trainer, rows[:1]))


def weighted_examples() -> list[TokenizedExample]:
    """Return examples with two answers each, of which the first words of the prompt are shared, and a weight."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for index, (length, weight) in enumerate([(9, 1.0), (23, 0.25), (14, 3.0), (11, 0.0)]):
        own = torch.randint(3, 250, (length,), generator=generator).tolist()
        mask = [False] * 7 + [3 <= place <= 5 or place >= length - 3 for place in range(length)]
        found.append(TokenizedExample(str(index), [1, 30, 31, 32, 33, 34, 35, *own], mask, weight))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_are_those_of_every_target_token_in_plain_cross_entropy(tiny_base: Path, smoothing: float) -> None:
    units = weighted_examples()
    plain = plain_model(tiny_base)
    total, weights = torch.zeros(()), 0.0
    for unit in units:
        logits = plain(input_ids=torch.tensor([unit.tokens])).logits[0, :-1]
        labels = [token if learned else -100 for token, learned in zip(unit.tokens, unit.loss_mask, strict=True)][1:]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels), ignore_index=-100, label_smoothing=smoothing, reduction="sum"
        )
        total = total + unit.weight * losses
        weights += unit.weight * sum(unit.loss_mask)
    (total / weights).backward()
    model = our_model(tiny_base)
    objective = Supervised(RowModel(model), SupervisedOptions(label_smoothing=smoothing), WIDE)
    agree(objective, units, model, (float(total.detach()) / weights, gradients(plain)))


def test_held_out_loss_is_without_label_smoothing(tiny_base: Path) -> None:
    units, model = weighted_examples(), our_model(tiny_base)
    smoothed, plain = (Supervised(RowModel(model), SupervisedOptions(label_smoothing=e), WIDE) for e in (0.2, 0.0))
    assert ours(smoothed, units, model, training=False)[0] == ours(plain, units, model)[0]


# Preferences


@pytest.mark.parametrize(
    ("options", "theirs_loss"),
    [
        (DpoOptions(beta=0.3), {"loss_type": "sigmoid"}),
        (
            DpoOptions(beta=0.3, label_smoothing=0.1),
            {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8], "label_smoothing": 0.1},
        ),
        (DpoOptions(beta=0.2, loss="ipo"), {"loss_type": "ipo"}),
    ],
    ids=["sigmoid", "smoothed", "ipo"],
)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_dpo_is_that_of_trl(
    tiny_base: Path, tmp_path: Path, options: DpoOptions, theirs_loss: dict[str, Any], full: bool
) -> None:
    """The reference is the model as it was before its first step, here an adapter that is trained already.

    TRL's sigmoid loss a knows no smoothing any more. Its robust one is r = ((1 - e) a - e b) / (1 - 2 e) with b the
    loss of the pair turned round, so conservative DPO, (1 - e) a + e b, is 2 (1 - e) a - (1 - 2 e) r.
    """
    trainer = dpo_trainer(tiny_base, tmp_path, full, beta=options.beta, **theirs_loss)
    rows, model = list(trainer.train_dataset), our_model(tiny_base, full=full)
    objective = Dpo(RowModel(model), options, WIDE)
    units = [pair(index, row) for index, row in enumerate(rows)]
    objective.prepare(units, tmp_path, "one", nothing)
    for trained in (model, trainer.model):
        perturb(trained, 2)
    agree(objective, units, model, theirs(trainer, rows))
    for index in range(2):
        agree(objective, units[index : index + 1], model, theirs(trainer, rows[index : index + 1]))


def dpo_trainer(tiny_base: Path, folder: Path, full: bool, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=plain_model(tiny_base, full=full),
        ref_model=plain_model(tiny_base, full=True) if full else None,
        args=DPOConfig(**settings(folder, **options)),
        train_dataset=dataset(pair_rows()),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_kto_is_that_of_trl(tiny_base: Path, tmp_path: Path, full: bool) -> None:
    """Both divide by the number of answers. TRL pairs each prompt with the answer before it in its own batch, in the
    order of the data, and cuts nothing; ours with the answer before it in the data, cut to the longer of the two
    examples. With our pairs fed to TRL, the two agree.
    """
    trainer = kto_trainer(tiny_base, tmp_path, full)
    rows, model = list(trainer.train_dataset), our_model(tiny_base, full=full)
    options = KtoOptions(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    objective = Kto(RowModel(model), options, WIDE)
    units = [
        TokenizedExample(
            str(index),
            [*row["prompt_ids"], *row["completion_ids"]],
            [False] * len(row["prompt_ids"]) + [True] * len(row["completion_ids"]),
            label=float(row["label"]),
        )
        for index, row in enumerate(rows)
    ]
    objective.prepare(units, tmp_path, "one", nothing)
    for unit, row, before in zip(units, rows, [rows[-1], *rows[:-1]], strict=True):
        mismatched = objective._others[unit.example_id]
        answer = [token for token, learned in zip(mismatched.tokens, mismatched.loss_mask, strict=True) if learned]
        assert row["KL_completion_ids"] == before["completion_ids"]
        assert answer == before["completion_ids"][: len(answer)]
        row["KL_completion_ids"] = answer
    for trained in (model, trainer.model):
        perturb(trained, 2)
    assert drift(trainer, rows) > 0
    agree(objective, units, model, theirs(trainer, rows))
    for index in range(2):  # a thumb up, a thumb down
        agree(objective, units[index : index + 1], model, theirs(trainer, rows[index : index + 1]))


def kto_trainer(tiny_base: Path, folder: Path, full: bool) -> Any:
    from trl import KTOConfig, KTOTrainer

    rows = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if index % 2 == 0 else "rejected"],
            "label": index % 2 == 0,
        }
        for index, row in enumerate(pair_rows())
    ]
    return KTOTrainer(
        model=plain_model(tiny_base, full=full),
        ref_model=plain_model(tiny_base, full=True) if full else None,
        args=KTOConfig(**settings(folder, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)),
        train_dataset=dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )


def drift(trainer: Any, rows: Sequence[dict[str, Any]]) -> float:
    theirs(trainer, rows)
    return float(trainer._metrics["train" if trainer.model.training else "eval"]["kl"][-1])


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_orpo_is_that_of_trl_where_the_prompt_is_learned_too(tiny_base: Path, tmp_path: Path, full: bool) -> None:
    """TRL's loss of the chosen answers counts the prompt's tokens (and so does the authors' code)."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model=plain_model(tiny_base, full=full),
        args=ORPOConfig(**settings(tmp_path, beta=0.4, max_length=512)),
        train_dataset=dataset(pair_rows()),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    rows = list(trainer.train_dataset)
    units = [
        TokenizedPair(str(index), *(labelled_side(str(index), row, kind) for kind in ("chosen", "rejected")))
        for index, row in enumerate(rows)
    ]
    model = our_model(tiny_base, full=full)
    objective = Orpo(RowModel(model), OrpoOptions(beta=0.4, learn_prompt=True), WIDE)
    agree(objective, units, model, theirs(trainer, rows))
    for index in range(2):
        agree(objective, units[index : index + 1], model, theirs(trainer, rows[index : index + 1]))


def labelled_side(name: str, row: dict[str, Any], kind: str) -> TokenizedExample:
    return TokenizedExample(name, row[f"{kind}_input_ids"], [label != -100 for label in row[f"{kind}_labels"]])


def test_the_odds_of_a_sure_answer_are_precise(tiny_base: Path) -> None:
    """Probabilities near 1 are where 1 - p loses its digits."""
    means = torch.tensor([-1e-1, -1e-3, -1e-5, -1e-6, -20.0])
    exact = means.double() - torch.log(-torch.expm1(means.double()))
    assert torch.allclose(log_odds(means).double(), exact, rtol=1e-6)


@pytest.mark.parametrize("centre", [0.0, 0.05])
def test_a_reward_model_is_that_of_trl(tiny_base: Path, tmp_path: Path, centre: float) -> None:
    from trl import RewardConfig, RewardTrainer

    margins = [0.0, 1.5, -0.5, 0.25, 3.0]
    rows = [row | {"margin": margin} for row, margin in zip(pair_rows(), margins, strict=True)]
    plain = AutoModelForSequenceClassification.from_pretrained
    trainer = RewardTrainer(
        model=scorer(tiny_base, plain, attn_implementation="eager", dtype=torch.float32),
        args=RewardConfig(**settings(tmp_path, center_rewards_coefficient=centre or None)),
        train_dataset=dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    rows = list(trainer.train_dataset)
    units = [
        TokenizedPair(
            str(index), *(side("", [], row[f"{kind}_ids"]) for kind in ("chosen", "rejected")), margin=row["margin"]
        )
        for index, row in enumerate(rows)
    ]
    model = scorer(tiny_base, partial(load_base, kind=AutoModelForSequenceClassification), precision="float32")
    objective = Reward(RowModel(model), RewardOptions(centre=centre), WIDE)
    agree(objective, units, model, theirs(trainer, rows))
    for index in range(2):
        agree(objective, units[index : index + 1], model, theirs(trainer, rows[index : index + 1]))
