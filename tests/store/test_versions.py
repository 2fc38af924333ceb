"""Named things have numbered versions that never change; the newest is what a bare name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import InputError, NotFoundError
from luthier.records.template import Template
from luthier.store.store import Store
from luthier.store.versions import check_name, parse_reference

ONE = Template(user="{{text}}", assistant="{{label}}")
OTHER = Template(system="Judge.", user="{{text}}", assistant="{{label}}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize("name", ["a", "tweets", "Tweets_2.1-final", "9", "a" * 64])
def test_plain_names_are_taken(name: str) -> None:
    assert check_name(name, "dataset") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "_a", "a b", "a/b", "../a", "a@1", "tweets\n", "ä", "a" * 65, "a:b", "a\0b"]
)
def test_name_that_could_be_a_path_or_a_reference_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="dataset name"):
        check_name(name, "dataset")


def test_reference_is_a_name_with_or_without_a_version() -> None:
    assert parse_reference("tweets", "dataset") == ("tweets", None)
    assert parse_reference("tweets@12", "dataset") == ("tweets", 12)


@pytest.mark.parametrize(
    "reference", ["tweets@", "tweets@0", "tweets@-1", "tweets@x", "tweets@1.0", "tweets@²", "t@1@2"]
)
def test_version_that_is_not_a_number_above_zero_is_refused(reference: str) -> None:
    with pytest.raises(InputError, match="whole number above 0"):
        parse_reference(reference, "dataset")


def test_each_new_text_is_a_new_version_and_the_newest_is_the_default(store: Store) -> None:
    assert store.templates.add("judge", ONE).reference == "judge@1"
    assert store.templates.add("judge", OTHER).reference == "judge@2"
    assert store.templates.get("judge").template == OTHER
    assert store.templates.get("judge@1").template == ONE


def test_saving_an_equal_text_again_gives_the_version_that_is_there(store: Store) -> None:
    store.templates.add("judge", ONE)
    store.templates.add("judge", OTHER)
    assert store.templates.add("judge", ONE).version == 1
    assert store.templates.add("other", ONE).reference == "other@1"
    assert [version.reference for version in store.templates.all()] == ["judge@1", "judge@2", "other@1"]


def test_versions_survive_reopening(store: Store) -> None:
    saved = store.templates.add("judge", ONE)
    store.close()
    assert Store(store.home).templates.get("judge") == saved


def test_unknown_name_is_not_found_with_a_suggestion(store: Store) -> None:
    store.templates.add("judge", ONE)
    with pytest.raises(NotFoundError, match="Did you mean 'judge'") as caught:
        store.templates.get("jugde")
    assert caught.value.hint == "luthier template list"


def test_unknown_version_is_not_found(store: Store) -> None:
    store.templates.add("judge", ONE)
    with pytest.raises(NotFoundError, match="'judge@2'"):
        store.templates.get("judge@2")


def test_name_that_breaks_the_rule_is_never_saved(store: Store) -> None:
    with pytest.raises(InputError, match="template name"):
        store.templates.add("../judge", ONE)
    assert store.templates.all() == []
