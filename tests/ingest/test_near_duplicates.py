"""Texts that are nearly the same come into one group, and others do not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.ingest.near_duplicates import (
    PERMUTATIONS,
    SIGNATURE_BYTES,
    Shingling,
    choose_shingling,
    group_near_duplicates,
    signature,
)

WORDS = [
    f"{first}{second}" for first in "bdfgklmnprst" for second in ("ana", "elo", "iru", "oke", "umi", "asto", "erin")
]
SINGLE_WORDS = Shingling(1, np.empty(0, np.uint64))


def text(seed: int, words: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def groups(texts: Sequence[str], similarity: float = 0.8, shingling: Shingling | None = None) -> list[int]:
    shingling = shingling or choose_shingling(set(texts))
    return group_near_duplicates(np.stack([signature(text, shingling) for text in texts]), similarity)


def estimate(one: str, other: str) -> float:
    return float((signature(one, SINGLE_WORDS) == signature(other, SINGLE_WORDS)).mean())


def test_different_texts_are_groups_of_their_own() -> None:
    texts = [text(number, 20) for number in range(300)]
    assert groups(texts) == list(range(300))


@pytest.mark.parametrize("words", [11, 25, 60, 400])
def test_text_with_one_word_changed_joins_the_group_of_the_first(words: int) -> None:
    originals = [text(number, words) for number in range(80)]
    changed = [" ".join([*original.split()[:-1], "otherwise"]) for original in originals]
    found = groups(originals + changed)
    assert found[:80] == list(range(80))
    assert sum(root == number for number, root in enumerate(found[80:])) >= 77  # similarity is estimated


def test_group_goes_on_through_texts_that_are_alike_one_by_one() -> None:
    words = text(5, 40).split()
    chain = [" ".join([*(f"new{at}" for at in range(count)), *words[count:]]) for count in range(0, 40, 2)]
    assert set(groups(chain, 0.8, SINGLE_WORDS)) == {0}
    assert len(set(groups([chain[0], chain[-1]], 0.8, SINGLE_WORDS))) == 2


def test_more_copies_than_the_window_looks_back_are_one_group() -> None:
    assert set(groups([text(1, 60)] * 50, 0.8, SINGLE_WORDS)) == {0}


def test_lower_similarity_joins_texts_that_a_higher_one_keeps_apart() -> None:
    words = text(3, 200).split()
    pair = [" ".join(words[:20]), " ".join([*words[:14], "one", "two", "three", "four", "five", "six"])]
    assert groups(pair, 0.9, SINGLE_WORDS) == [0, 1]
    assert groups(pair, 0.3, SINGLE_WORDS) == [0, 0]


def test_similarity_of_one_joins_only_equal_sets_of_words() -> None:
    texts = ["alpha beta gamma", "gamma alpha beta", "alpha beta gamma delta"]
    assert groups(texts, 1.0, SINGLE_WORDS) == [0, 0, 2]


def test_no_texts_make_no_groups() -> None:
    assert group_near_duplicates(np.empty((0, PERMUTATIONS), np.uint16), 0.8) == []


def test_texts_without_words_are_compared_as_they_are() -> None:
    assert groups(["", "!!!", "???", "!!!"], 0.8, SINGLE_WORDS) == [0, 1, 2, 1]


def test_texts_without_spaces_are_compared_by_their_characters() -> None:
    letters = [chr(0x4E00 + number) for number in range(3000)]
    texts = ["".join(random.Random(number).sample(letters, 18)) for number in range(60)]
    found = groups([*texts, *(text[:-1] + "々" for text in texts)])
    assert sum(root == number for number, root in enumerate(found[60:])) >= 57


def test_sums_that_differ_in_their_sign_are_not_alike() -> None:
    texts = [f"{number * 13} {sign} {number * 17 + 1}" for number in range(50) for sign in "+*"]
    assert groups(texts) == list(range(100))


def test_word_said_twice_is_not_the_word_said_once() -> None:
    assert groups(["no", "no no", "no no no no"], 0.8, SINGLE_WORDS) == [0, 1, 2]


def test_instruction_that_many_texts_share_does_not_make_them_alike() -> None:
    instruction = text(999, 60)
    texts = [f"{instruction} {text(number, 10)}" for number in range(100)]
    assert len(choose_shingling(texts).common_runs) > 0
    assert groups(texts) == list(range(100))
    assert len(set(groups(texts, 0.8, SINGLE_WORDS))) < 10


def test_texts_that_are_nothing_but_the_instruction_are_still_compared() -> None:
    texts = [f"{text(999, 60)} {text(number, 10)}" for number in range(100)]
    shingling = choose_shingling(texts)
    assert groups([text(999, 60), text(999, 60), text(4, 60)], 0.8, shingling) == [0, 0, 2]


@pytest.mark.parametrize(("words", "shingle"), [(10, 1), (25, 2), (100, 3)])
def test_longer_texts_are_cut_into_longer_shingles(words: int, shingle: int) -> None:
    assert choose_shingling({text(number, words) for number in range(40)}).words == shingle


def test_signature_estimates_the_jaccard_similarity_of_the_words() -> None:
    words = [f"word{number}" for number in range(300)]
    for shared in (0, 60, 150, 240):
        one, other = " ".join(words[:240]), " ".join(words[240 - shared : 300])
        union = len(set(one.split()) | set(other.split()))
        jaccard = len(set(one.split()) & set(other.split())) / union
        error = (jaccard * (1 - jaccard) / PERMUTATIONS) ** 0.5
        assert abs(estimate(one, other) - jaccard) <= 4 * error + 1 / PERMUTATIONS


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=60), seed=st.integers(0, 100))
def test_order_of_the_words_does_not_change_the_signature_of_single_words(words: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(words, len(words))
    one = signature(" ".join(words), SINGLE_WORDS)
    assert one.nbytes == SIGNATURE_BYTES
    assert (one == signature(" ".join(shuffled), SINGLE_WORDS)).all()
