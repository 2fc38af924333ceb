"""Groups are repeated or thinned by their factor, the same way every time."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import InputError
from luthier.ingest import sampling
from luthier.ingest.sampling import ResampledGroup, resample
from luthier.records.example import Example

SIZES = {"rare": 2, "some": 10, "many": 50}
EXAMPLES = [
    Example(id=f"{name}-{number}", fields={"group": name}) for name, size in SIZES.items() for number in range(size)
]


def counts(examples: Iterable[Example]) -> dict[str, int]:
    return dict(Counter(str(example.fields["group"]) for example in examples))


def test_factor_repeats_whole_and_draws_the_rest() -> None:
    taken, report = resample(EXAMPLES, "group", {"some": 2.5, "many": 0.3}, seed=1)
    assert counts(taken) == {"rare": 2, "some": 25, "many": 15}
    times = Counter(example.id for example in taken if example.fields["group"] == "some")
    assert sorted(times.values()) == [2] * 5 + [3] * 5
    assert report[0] == ResampledGroup("many", 0.3, 50, 15)


def test_same_seed_gives_the_same_examples_in_any_order_and_another_seed_others() -> None:
    factors = {"many": 0.5}
    first = Counter(example.id for example in resample(EXAMPLES, "group", factors, seed=1)[0])
    shuffled = random.Random(0).sample(EXAMPLES, len(EXAMPLES))
    assert Counter(example.id for example in resample(shuffled, "group", factors, seed=1)[0]) == first
    assert Counter(example.id for example in resample(EXAMPLES, "group", factors, seed=2)[0]) != first


def test_examples_stay_in_their_order() -> None:
    taken, _ = resample(EXAMPLES, "group", {"some": 1.5, "many": 0.2}, seed=3)
    places = [EXAMPLES.index(example) for example in taken]
    assert places == sorted(places)


def test_balancing_brings_groups_to_the_largest_but_not_more_than_tenfold() -> None:
    taken, report = resample(EXAMPLES, lambda example: str(example.fields["group"]), "balanced")
    assert counts(taken) == {"rare": 20, "some": 50, "many": 50}
    assert [(group.name, group.capped) for group in report] == [("many", False), ("rare", True), ("some", False)]


def test_the_examples_that_are_taken_stay_the_same_ones() -> None:
    taken, _ = resample(EXAMPLES, "group", {"rare": 1.5, "some": 0.3, "many": 0.06}, seed=1)
    rare, some, many = ["rare-0", "rare-1", "rare-1"], ["some-0", "some-5", "some-7"], ["many-1", "many-39", "many-41"]
    assert [example.id for example in taken] == rare + some + many


def test_examples_with_one_id_are_told_apart_by_their_order() -> None:
    twins = [Example(id="twin", fields={"group": "a", "number": number}) for number in range(4)]
    taken, _ = resample(twins, "group", {"a": 1.5})
    assert [example.fields["number"] for example in taken] == [0, 0, 1, 1, 2, 3]


class Rows:
    """Examples that are made whenever they are read, 400 and more bytes each."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    def __iter__(self) -> Iterator[Example]:
        for number in range(self.count):
            self.read += 1
            yield Example(id=f"e{number}", fields={"group": f"g{number % 97}", "text": "x" * 200})


def test_examples_are_read_twice_and_never_held() -> None:
    examples = Rows(20_000)
    tracemalloc.start()
    taken, _ = resample(examples, "group", "balanced")
    count = sum(1 for _ in taken)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert examples.read == 2 * 20_000
    assert count == 97 * 207  # the size of the largest group
    assert peak < 20_000 * 80  # bytes


def test_group_vanishes_only_with_the_factor_0() -> None:
    taken, _ = resample(EXAMPLES, "group", {"rare": 0.01, "some": 0})
    assert counts(taken) == {"rare": 1, "many": 50}


@given(st.floats(0, 9), st.integers(0, 99))
def test_size_is_the_factor_times_the_group_rounded(factor: float, seed: int) -> None:
    _, report = resample(EXAMPLES, "group", {"some": factor}, seed)
    assert abs(report[2].after - 10 * factor) <= (1 if 10 * factor < 1 else 0.5)


@pytest.mark.parametrize(
    ("group_of", "factors", "said"),
    [
        ("group", {"rar": 2.0, "many": -1.0}, ["no group 'rar'. Did you mean 'rare'?", "'many' has the factor -1.0"]),
        ("group", {"many": float("nan")}, ["finite"]),
        ("groups", {}, ["no field 'groups'", "Did you mean 'group'?"]),
        ("group", {"rare": 0, "some": 0, "many": 0}, ["No example is left"]),
    ],
)
def test_what_cannot_be_sampled_is_refused_with_all_reasons(group_of: str, factors: Any, said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        resample(EXAMPLES, group_of, factors)
    assert all(part in str(caught.value) for part in said)


def test_examples_without_a_group_are_named() -> None:
    with pytest.raises(InputError, match="1 of 63 examples have no group") as caught:
        resample([*EXAMPLES, Example(id="lost", fields={"group": None})], "group", "balanced")
    assert caught.value.problems == ("example lost has no group",)


def test_an_error_does_not_grow_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PROBLEMS_KEPT", 2)
    lost = [Example(id=f"lost-{number}", fields={"group": ""}) for number in range(5)]
    with pytest.raises(InputError, match="5 of 67 examples have no group") as caught:
        resample([*EXAMPLES, *lost], "group", "balanced")
    assert caught.value.problems == ("example lost-0 has no group", "example lost-1 has no group")


def test_no_examples_are_refused() -> None:
    with pytest.raises(InputError, match="no examples"):
        resample([], "group", "balanced")
