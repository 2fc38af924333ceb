"""Rows that share a prefix give every token what the example by itself gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.llm.engine.row_forward import score_examples, target_logits
from luthier.llm.engine.torch_model import load_base
from luthier.llm.rows import computed_tokens, pack, shared_prefix
from luthier.templates.renderer import TokenizedExample

PREFIX = [5, 6, 7, 8, 9, 10]


def example(index: int, rest: list[int], learned: int) -> TokenizedExample:
    tokens = [*PREFIX, *rest]
    return TokenizedExample(str(index), tokens, [False] * (len(tokens) - learned) + [True] * learned)


@pytest.fixture
def examples() -> list[TokenizedExample]:
    rests = [[20, 21, 22, 23], [30, 31], [20, 21, 40, 41, 42, 43, 44], [50, 51, 52]]
    return [example(index, rest, 2 if len(rest) > 2 else 1) for index, rest in enumerate(rests)]


def test_the_shared_prefix_ends_where_examples_part(examples: list[TokenizedExample]) -> None:
    assert shared_prefix(examples) == len(PREFIX)


def test_the_shared_prefix_never_holds_the_token_before_the_first_loss() -> None:
    same = [TokenizedExample("a", [1, 2, 3, 4], [False, False, True, True])] * 2
    assert shared_prefix(same) == 1


def test_scores_of_a_packed_row_are_those_of_each_example_by_itself(
    tiny_base: Path, examples: list[TokenizedExample]
) -> None:
    model = load_base(tiny_base, "float32")
    packed = dict(score_examples(model, examples, tokens_per_row=64))
    for index, one in enumerate(examples):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.tokens])).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)
        places = [i for i, learned in enumerate(one.loss_mask) if learned]
        expected = [float(logprobs[i - 1, one.tokens[i]]) for i in places]
        assert [target.logprob for target in packed[index]] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert [target.chosen for target in packed[index]] == [int(logits[i - 1].argmax()) for i in places]


def test_gradients_of_a_packed_row_are_those_of_the_examples_one_by_one(
    tiny_base: Path, examples: list[TokenizedExample]
) -> None:
    def gradient(groups: list[list[TokenizedExample]]) -> torch.Tensor:
        model = load_base(tiny_base, "float32")
        for group in groups:
            for row in pack(group, shared_prefix(group) if len(group) > 1 else 0, 64):
                logits, targets = target_logits(model, row, torch.float32)
                torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert weight.grad is not None
        return weight.grad

    together, alone = gradient([examples]), gradient([[one] for one in examples])
    assert float((together - alone).norm() / alone.norm()) < 1e-5


def test_rows_hold_every_example_once_and_stay_within_their_length(examples: list[TokenizedExample]) -> None:
    rows = pack(examples, len(PREFIX), tokens_per_row=14)
    assert sorted(index for row in rows for index in row.examples) == [0, 1, 2, 3]
    assert all(len(row.tokens) <= 14 for row in rows)
    assert computed_tokens(examples, len(PREFIX), 14, batch_size=4) == sum(len(row.tokens) for row in rows)


def test_an_example_longer_than_a_row_gets_a_row_of_its_own() -> None:
    long, short = example(0, list(range(20, 60)), 1), example(1, [3, 4], 1)
    assert sorted(row.examples for row in pack([long, short], len(PREFIX), tokens_per_row=16)) == [(0,), (1,)]


@given(st.lists(st.lists(st.integers(11, 90), min_size=2, max_size=30), min_size=1, max_size=12), st.integers(8, 80))
def test_packing_keeps_every_target(rests: list[list[int]], tokens_per_row: int) -> None:
    examples = [example(index, rest, 1 + len(rest) // 2) for index, rest in enumerate(rests)]
    prefix = shared_prefix(examples)
    packed: dict[int, list[int]] = {}
    for row in pack(examples, prefix, tokens_per_row):
        for owner, (source, token) in zip(row.owners, row.targets, strict=True):
            packed.setdefault(row.examples[owner], []).append(token)
            assert 0 <= source < len(row.tokens)
    for index, one in enumerate(examples):
        assert packed[index] == [t for t, learned in zip(one.tokens, one.loss_mask, strict=True) if learned]
