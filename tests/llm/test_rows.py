"""Rows hold every example once, keep groups together, and give every token what the example by itself gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.llm.engine.row_model import RowModel, score_examples
from luthier.llm.engine.torch_model import load_base
from luthier.llm.rows import Group, Row, pack, pack_groups, shared_prefix
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
    packed = dict(score_examples(RowModel(model), examples, tokens_per_row=64))
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
            for row in pack(group, 64, share=len(group) > 1):
                (-RowModel(model).targets(row).logprobs_M.sum()).backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert weight.grad is not None
        return weight.grad

    together, alone = gradient([examples]), gradient([[one] for one in examples])
    assert float((together - alone).norm() / alone.norm()) < 1e-5


def test_rows_hold_every_example_once_and_stay_within_their_length(examples: list[TokenizedExample]) -> None:
    rows = pack(examples, tokens_per_row=14)
    assert sorted(index for row in rows for index in row.examples) == [0, 1, 2, 3]
    assert all(len(row.tokens) <= 14 for row in rows)
    assert all(row.groups == (Group(len(PREFIX), rest_lengths(examples, row)),) for row in rows)


def rest_lengths(examples: list[TokenizedExample], row: Row) -> tuple[int, ...]:
    return tuple(len(examples[index].tokens) - len(PREFIX) for index in row.examples)


def test_an_example_longer_than_a_row_gets_a_row_of_its_own() -> None:
    long, short = example(0, list(range(20, 60)), 1), example(1, [3, 4], 1)
    assert sorted(row.examples for row in pack([long, short], tokens_per_row=16)) == [(0,), (1,)]


@given(st.lists(st.lists(st.integers(11, 90), min_size=2, max_size=30), min_size=1, max_size=12), st.integers(8, 80))
def test_packing_keeps_every_target(rests: list[list[int]], tokens_per_row: int) -> None:
    examples = [example(index, rest, 1 + len(rest) // 2) for index, rest in enumerate(rests)]
    packed: dict[int, list[int]] = {}
    for row in pack(examples, tokens_per_row):
        for owner, (source, token) in zip(row.owners, row.targets, strict=True):
            packed.setdefault(row.examples[owner], []).append(token)
            assert 0 <= source < len(row.tokens)
    for index, one in enumerate(examples):
        assert packed[index] == [t for t, learned in zip(one.tokens, one.loss_mask, strict=True) if learned]


def pair(index: int, prompt: list[int], answers: tuple[list[int], list[int]]) -> list[TokenizedExample]:
    return [
        TokenizedExample(str(index), [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for answer in answers
    ]


def test_members_of_a_group_share_its_prefix_and_stay_together() -> None:
    first = pair(0, [5, 6, 7, 8], ([20, 21], [22, 23, 24]))
    second = pair(1, [5, 9], ([30], [31]))
    sides = [*first, *second]
    (row,) = pack_groups(sides, [(0, 1), (2, 3)], 64)
    assert row.examples == (0, 1, 2, 3)
    # Targets are predicted from within an example: the last token of the prompt stands in each rest.
    assert row.groups == (Group(3, (3, 4)), Group(1, (2, 2)))
    assert row.tokens == [5, 6, 7, 8, 20, 21, 8, 22, 23, 24, 5, 9, 30, 9, 31]
    assert row.targets == [(3, 20), (4, 21), (6, 22), (7, 23), (8, 24), (11, 30), (13, 31)]
    assert row.owners == [0, 0, 1, 1, 1, 2, 3]
    assert row.ends == [5, 9, 12, 14]
    assert [row.examples for row in pack_groups(sides, [(0, 1), (2, 3)], 10)] == [(0, 1), (2, 3)]


@given(st.lists(st.tuples(*[st.lists(st.integers(11, 90), min_size=1, max_size=9)] * 3), min_size=1, max_size=9))
def test_packing_groups_keeps_every_side(made: list[tuple[list[int], list[int], list[int]]]) -> None:
    sides = [side for index, (prompt, *answers) in enumerate(made) for side in pair(index, prompt, (*answers,))]
    groups = [(2 * index, 2 * index + 1) for index in range(len(made))]
    rows = pack_groups(sides, groups, 24)
    assert sorted(index for row in rows for index in row.examples) == list(range(len(sides)))
    for row in rows:
        assert all(row.examples[place : place + 2] in groups for place in range(0, len(row.examples), 2))
        assert sum(group.prefix + sum(group.rest_lengths) for group in row.groups) == len(row.tokens)
        for place, index in enumerate(row.examples):
            assert row.tokens[row.ends[place]] == sides[index].tokens[-1]
            learned = [token for owner, (_, token) in zip(row.owners, row.targets, strict=True) if owner == place]
            assert learned == [t for t, learn in zip(sides[index].tokens, sides[index].loss_mask, strict=True) if learn]
