"""A split keeps what is alike on one side and holds its shares for every label."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.ingest.splitting import assign_splits
from luthier.records.dataset import SplitConfig
from luthier.records.example import Example, Message

WORDS = [
    f"{first}{second}" for first in "bdfgklmnprst" for second in ("ana", "elo", "iru", "oke", "umi", "asto", "erin")
]


def text(seed: int, words: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def rows(*fields: dict[str, object]) -> list[Example]:
    return [Example(id=f"row-{number}", fields=values, line=number + 1) for number, values in enumerate(fields, 1)]


def labelled(**counts: int) -> list[Example]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return rows(*({"text": text(number), "label": label} for number, label in enumerate(labels)))


def test_shares_hold_exactly_where_nothing_is_alike() -> None:
    sides, report = assign_splits(labelled(a=200), SplitConfig(validation=0.1, test=0.2))
    assert Counter(sides) == report.counts == {"train": 140, "validation": 20, "test": 40}
    assert (report.exact_duplicates, report.near_duplicates, report.largest_group, report.label_counts) == (0, 0, 1, {})


def test_shares_hold_for_every_label() -> None:
    report = assign_splits(labelled(a=700, b=200, c=97, d=3), SplitConfig(label="label"))[1]
    for label, count in {"a": 700, "b": 200, "c": 97, "d": 3}.items():
        for side in ("validation", "test"):
            assert abs(report.label_counts[side][label] - count * 0.1) <= 1
            assert report.label_counts[side][label] >= 1
    assert abs(report.counts["test"] - 100) <= 1


def test_many_small_labels_do_not_push_the_total_away_from_its_share() -> None:
    counts = {f"label{number:02d}": 26 for number in range(70)}
    report = assign_splits(labelled(**counts), SplitConfig(label="label"))[1]
    assert abs(report.counts["test"] - 182) <= 1


def pairs(prompts: list[str]) -> list[Example]:
    answers = [Message(role="assistant", content=text(1_000 + number)) for number in range(2 * len(prompts))]
    return [
        Example(
            id=f"row-{number}",
            messages=(Message(role="user", content=prompt), answers[2 * number]),
            rejected=(answers[2 * number + 1],),
        )
        for number, prompt in enumerate(prompts)
    ]


def test_all_pairs_of_one_prompt_are_on_one_side() -> None:
    prompts = [text(number // 3) for number in range(150)]
    sides, report = assign_splits(pairs(prompts), SplitConfig(validation=0.2, test=0.2))
    assert len(set(zip(prompts, sides, strict=True))) == 50
    assert set(sides) == {"train", "validation", "test"}
    assert report.largest_group == 3


def test_pairs_that_share_their_only_prompt_are_divided_by_their_answers() -> None:
    sides, _ = assign_splits(pairs(["which of these two is the better joke"] * 60), SplitConfig())
    assert Counter(sides) == {"train": 48, "validation": 6, "test": 6}


def test_one_label_value_is_allowed() -> None:
    assert assign_splits(labelled(only=30), SplitConfig(label="label"))[1].counts["test"] == 3


def test_split_keeps_exact_duplicates_on_one_side_whatever_their_label_case_and_spaces() -> None:
    pairs = [
        {"text": variant, "label": label}
        for number in range(60)
        for variant, label in ((text(number), "a"), (f"  {text(number).upper()}\n", "b"))
    ]
    config = SplitConfig(label="label", near_duplicate_similarity=None)
    sides, report = assign_splits(rows(*pairs), config)
    assert sides[0::2] == sides[1::2]
    assert (report.exact_duplicates, report.near_duplicates, report.largest_group) == (60, 0, 2)


def test_ids_and_ratings_do_not_make_a_copy_a_new_example() -> None:
    fields = [
        {"id": f"t{copy}-{number}", "text": text(number), "score": copy / 7}
        for copy in range(2)
        for number in range(60)
    ]
    sides, report = assign_splits(rows(*fields), SplitConfig())
    assert sides[:60] == sides[60:]
    assert report.exact_duplicates == 60


def test_rows_that_share_their_question_and_differ_in_other_fields_are_different() -> None:
    fields = [{"question": "What is the sum of both?", "a": number, "b": number * 7} for number in range(100)]
    assert assign_splits(rows(*fields), SplitConfig())[1].counts["test"] == 10


@pytest.mark.parametrize("words", [11, 25, 60, 400])
def test_split_keeps_near_duplicates_on_one_side(words: int) -> None:
    fields = []
    for number in range(80):
        original = text(number, words)
        changed = " ".join([*original.split()[:-1], "otherwise"])
        fields += [{"text": original}, {"text": original.replace(" ", ", ", 2) + "!!!"}, {"text": changed}]
    sides, report = assign_splits(rows(*fields), SplitConfig())
    together = [len(set(sides[start : start + 3])) == 1 for start in range(0, len(sides), 3)]
    assert sum(together) >= 77  # The similarity is estimated: a few pairs at the threshold may be missed.
    assert report.near_duplicates >= 150
    assert abs(report.counts["test"] - 24) <= 2


def test_shared_instruction_does_not_make_all_conversations_alike() -> None:
    system = Message(role="system", content="Classify the sentiment of this tweet. " + text(1, 60))
    examples = [
        Example(
            id=str(number),
            messages=(
                system,
                Message(role="user", content="Tweet to look at now: " + text(number + 10, 10)),
                Message(role="assistant", content="positive"),
            ),
        )
        for number in range(100)
    ]
    report = assign_splits([*examples, *examples], SplitConfig())[1]
    assert (report.exact_duplicates, report.near_duplicates, report.counts["test"]) == (100, 0, 20)


def test_group_larger_than_the_test_share_goes_to_train() -> None:
    examples = rows(
        *({"text": text(7), "n": number} for number in range(30)), *({"text": text(n)} for n in range(100, 170))
    )
    sides, report = assign_splits(examples, SplitConfig())
    assert set(sides[:30]) == {"train"}
    assert report.counts == {"train": 80, "validation": 10, "test": 10}
    assert report.largest_group == 30


def test_large_groups_still_leave_every_side_of_a_label_an_example() -> None:
    fields = [{"text": text(group), "label": "a", "n": n} for group in range(4) for n in range(10)]
    report = assign_splits(rows(*fields), SplitConfig(label="label"))[1]
    assert report.counts == {"train": 20, "validation": 10, "test": 10}


@settings(max_examples=50, deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(3, 40), min_size=1),
    copies=st.lists(st.tuples(st.integers(0, 39), st.sampled_from("abcdef")), max_size=30),
    seed=st.integers(0, 1000),
    shares=st.tuples(st.sampled_from([0.05, 0.1, 0.3]), st.sampled_from([0.05, 0.2, 0.45])),
)
def test_no_content_is_on_two_sides_and_every_label_is_on_every_side(
    counts: dict[str, int], copies: list[tuple[int, str]], seed: int, shares: tuple[float, float]
) -> None:
    examples = labelled(**counts)
    examples += rows(*({**examples[at % len(examples)].fields, "label": label} for at, label in copies))
    groups: dict[object, Counter[str]] = defaultdict(Counter)
    for example in examples:
        groups[example.fields["text"]][example.fields["label"]] += 1
    majorities = Counter(min(members, key=lambda label: (-members[label], label)) for members in groups.values())
    assume(max(majorities.values()) >= 3)
    config = SplitConfig(label="label", validation=shares[0], test=shares[1], seed=seed)
    sides, report = assign_splits(iter(examples), config)
    sides_of: dict[object, set[str]] = defaultdict(set)
    for example, side in zip(examples, sides, strict=True):
        sides_of[example.fields["text"]].add(side)
    assert all(len(found) == 1 for found in sides_of.values())
    assert sum(report.counts.values()) == len(sides) == len(examples)
    for label, count in majorities.items():
        if count >= 3:
            assert all(report.label_counts[side][label] >= 1 for side in ("train", "validation", "test"))


def test_seed_decides_and_the_order_of_the_rows_does_not() -> None:
    examples = labelled(a=60, b=40)
    config = SplitConfig(label="label")
    first = dict(zip(map(str, examples), assign_splits(examples, config)[0], strict=True))
    backwards = dict(zip(map(str, examples[::-1]), assign_splits(examples[::-1], config)[0], strict=True))
    other = dict(
        zip(map(str, examples), assign_splits(examples, config.model_copy(update={"seed": 1}))[0], strict=True)
    )
    assert first == backwards
    assert first != other


def test_sides_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from luthier.ingest.splitting import assign_splits\n"
        "from luthier.records.dataset import SplitConfig\n"
        "from luthier.records.example import Example\n"
        "fields = [{'b': f'word{n} of text {n * n}', 'a': 'x' * (n % 3 + 1)} for n in range(60)]\n"
        "rows = [Example(id=str(n), fields=values) for n, values in enumerate(fields)]\n"
        "print(assign_splits(rows, SplitConfig(label='a'))[0])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_progress_counts_the_examples_read() -> None:
    seen: list[int] = []
    assign_splits(labelled(a=2500), SplitConfig(), on_progress=seen.append)
    assert seen == [1000, 2000]


def test_unknown_label_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'label'"):
        assign_splits(labelled(a=10), SplitConfig(label="lable"))


def test_missing_labels_are_counted_with_their_lines() -> None:
    examples = labelled(a=10) + rows({"text": "x", "label": " "}, {"text": "y"}, {"text": "z", "label": None})
    with pytest.raises(
        InputError, match="3 of 13 examples have no value for the label 'label'; the first is line 2"
    ) as caught:
        assign_splits(examples, SplitConfig(label="label"))
    assert len(caught.value.problems) == 3


def test_shares_that_leave_nothing_for_train_are_refused() -> None:
    with pytest.raises(InputError, match="less than 1"):
        assign_splits(labelled(a=10), SplitConfig(validation=0.5, test=0.5))


def test_too_few_examples_are_refused_with_their_number() -> None:
    with pytest.raises(InputError, match="2 examples in 2 groups of duplicates cannot fill 3 sides"):
        assign_splits(labelled(a=2), SplitConfig())
    with pytest.raises(InputError, match="20 examples in 1 groups") as caught:
        assign_splits(labelled(a=1) * 20, SplitConfig())
    assert "raise --near" in str(caught.value.hint)
    with pytest.raises(InputError, match="0 examples"):
        assign_splits([], SplitConfig(label="label"))


def test_label_with_a_value_for_each_row_is_refused_where_it_leaves_a_side_empty() -> None:
    examples = rows(*({"text": text(number), "label": f"only{number}"} for number in range(6)))
    with pytest.raises(InputError, match="Nothing is left for test and validation"):
        assign_splits(examples, SplitConfig(label="label", validation=0.05, test=0.05))


def test_three_examples_are_enough_for_three_sides_and_all_may_go_to_train() -> None:
    assert sorted(assign_splits(labelled(a=3), SplitConfig())[0]) == ["test", "train", "validation"]
    assert set(assign_splits(labelled(a=3), SplitConfig(validation=0, test=0))[0]) == {"train"}


def test_splitting_keeps_no_texts() -> None:
    def long_examples() -> Iterator[Example]:
        for number in range(3000):
            yield Example(id=str(number), fields={"text": f"{text(number)} {'p' * 8000}"})

    tracemalloc.start()
    try:
        assign_splits(long_examples(), SplitConfig())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12_000_000  # The texts are 24 MB together; the sample that is looked at first is bounded.
