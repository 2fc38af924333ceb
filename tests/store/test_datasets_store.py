"""Dataset versions are kept whole, numbered, and held against their hash whenever they are read."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from luthier.errors import InputError, IntegrityError, NotFoundError
from luthier.records.dataset import DatasetVersion, ImportReport, SourceFormat, SplitConfig, SplitReport
from luthier.records.example import Example, Message
from luthier.store.datasets import EXAMPLES_FILE, Write
from luthier.store.store import Store

REPORT = ImportReport(format=SourceFormat(kind="csv", delimiter=","), taken=3, left=0, fields=("text", "label"))
EXAMPLES = [Example(id=f"e{n}", fields={"text": f"text {n} é 日本", "label": n % 2}, line=n + 2) for n in range(3)]
IMPORTER = """
import sys, time
from pathlib import Path
from luthier.records.example import Example
from luthier.store.store import Store

def fill(write):
    write(Example(id="e0", fields={"text": "x" * 100_000}))
    print("writing", flush=True)
    time.sleep(600)

Store(Path(sys.argv[1])).datasets.add("tweets", "fields", "tweets.csv", fill)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def filling(examples: Iterable[Example]) -> Callable[[Write], ImportReport]:
    def fill(write: Write) -> ImportReport:
        for example in examples:
            write(example)
        return REPORT

    return fill


def add(store: Store, name: str = "tweets", examples: Iterable[Example] = EXAMPLES) -> DatasetVersion:
    return store.datasets.add(name, "fields", "tweets.csv", filling(examples))


def split(store: Store, parent: DatasetVersion) -> DatasetVersion:
    report = SplitReport(config=SplitConfig(), counts={"train": 1, "validation": 1, "test": 1})

    def fill(write: Write) -> SplitReport:
        for example in store.datasets.with_splits(parent, ["train", "test", "validation"]):
            write(example)
        return report

    return store.datasets.add(parent.name, parent.kind, parent.source, fill, parent=parent)


def examples_path(store: Store, dataset: DatasetVersion) -> Path:
    return store.artifacts.path(dataset.folder) / EXAMPLES_FILE


def files(store: Store) -> list[Path]:
    return [path for path in store.artifacts.root.rglob("*") if path.is_file()]


def test_examples_come_back_as_they_were_written_and_in_their_order(store: Store) -> None:
    chat = Example(
        id="c1", messages=(Message(role="user", content="hi"), Message(role="assistant", content="ho", weight=0))
    )
    dataset = add(store, examples=[*EXAMPLES, chat])
    assert list(store.datasets.examples(dataset)) == [*EXAMPLES, chat]
    assert (dataset.reference, dataset.examples, dataset.fields) == ("tweets@1", 4, ("text", "label"))
    assert (dataset.report, dataset.source) == (REPORT, "tweets.csv")


def test_version_survives_reopening(store: Store) -> None:
    dataset = add(store)
    store.close()
    reopened = Store(store.home)
    assert reopened.datasets.get("tweets") == dataset
    assert list(reopened.datasets.examples(dataset)) == EXAMPLES


def test_versions_are_counted_for_each_name(store: Store) -> None:
    assert [add(store, name).reference for name in ("tweets", "films", "tweets")] == ["tweets@1", "films@1", "tweets@2"]
    assert [dataset.reference for dataset in store.datasets.all()] == ["films@1", "tweets@1", "tweets@2"]
    assert store.datasets.get("tweets").version == 2
    assert store.datasets.get("tweets@1").version == 1


def test_versions_added_at_the_same_time_get_different_numbers(store: Store) -> None:
    all_wait = threading.Barrier(6)

    def add_with_the_others() -> None:
        other = Store(store.home)
        all_wait.wait()
        add(other)
        other.close()

    threads = [threading.Thread(target=add_with_the_others) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [dataset.version for dataset in store.datasets.all()] == [1, 2, 3, 4, 5, 6]


def test_equal_examples_have_an_equal_hash_whatever_their_name(store: Store) -> None:
    first, same, other = add(store), add(store, "copies"), add(store, "fewer", EXAMPLES[:2])
    assert first.content_hash == same.content_hash
    assert other.content_hash != first.content_hash
    assert add(store, "reversed", EXAMPLES[::-1]).content_hash != first.content_hash


def test_split_is_a_new_version_of_other_content_that_names_its_parent(store: Store) -> None:
    parent = add(store)
    child = split(store, parent)
    assert (child.reference, child.parent, child.fields, child.report) == ("tweets@2", 1, parent.fields, REPORT)
    assert child.split is not None
    assert child.content_hash != parent.content_hash
    assert [example.id for example in store.datasets.examples(child)] == ["e0", "e1", "e2"]
    assert [example.id for example in store.datasets.examples(child, "test")] == ["e1"]
    assert list(store.datasets.examples(parent, "test")) == []


def test_sides_that_are_not_as_many_as_the_examples_are_an_error(store: Store) -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(store.datasets.with_splits(add(store), ["train"]))


def test_import_that_fails_leaves_nothing(store: Store) -> None:
    def fill(write: Write) -> ImportReport:
        write(EXAMPLES[0])
        raise InputError("line 3 is broken")

    with pytest.raises(InputError, match="line 3 is broken"):
        store.datasets.add("tweets", "fields", "tweets.csv", fill)
    assert store.datasets.all() == []
    assert files(store) == []


def test_process_killed_during_an_import_leaves_no_version(store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", IMPORTER, str(store.home)], stdout=subprocess.PIPE) as importer:
        assert importer.stdout is not None
        assert importer.stdout.readline() == b"writing\n"
        importer.send_signal(signal.SIGKILL)
    assert store.datasets.all() == []
    assert not (store.artifacts.root / "datasets").exists()
    assert add(store).reference == "tweets@1"


def test_changed_example_is_noticed(store: Store) -> None:
    dataset = add(store)
    path = examples_path(store, dataset)
    path.write_bytes(path.read_bytes().replace(b"text 1", b"text 7"))
    with pytest.raises(IntegrityError, match="tweets@1 on disk are not the recorded ones"):
        list(store.datasets.examples(dataset))
    with pytest.raises(IntegrityError, match="not the recorded ones"):
        list(store.datasets.examples(dataset, "test"))


@pytest.mark.parametrize("damage", [b"", b"not json\n", b'{"id": "e0", "unknown": 1}\n'])
def test_file_that_is_not_examples_any_more_is_noticed(store: Store, damage: bytes) -> None:
    dataset = add(store)
    examples_path(store, dataset).write_bytes(damage)
    with pytest.raises(IntegrityError, match="not the recorded ones"):
        list(store.datasets.examples(dataset))


def test_missing_file_is_noticed(store: Store) -> None:
    dataset = add(store)
    store.artifacts.remove(dataset.folder)
    with pytest.raises(IntegrityError, match="not the recorded ones"):
        list(store.datasets.examples(dataset))


def test_name_that_could_leave_the_folder_is_refused_before_anything_is_written(store: Store) -> None:
    with pytest.raises(InputError, match="dataset name"):
        add(store, "../tweets")
    assert files(store) == []


def test_unknown_dataset_is_not_found_with_a_suggestion(store: Store) -> None:
    add(store)
    with pytest.raises(NotFoundError, match="Did you mean 'tweets'"):
        store.datasets.get("tweet")
    with pytest.raises(NotFoundError, match="tweets@2"):
        store.datasets.get("tweets@2")


def test_adding_and_reading_keep_no_examples_in_memory(store: Store) -> None:
    many = (Example(id=str(n), fields={"text": "x" * 2_000, "n": n}) for n in range(5_000))
    tracemalloc.start()
    try:
        dataset = add(store, examples=many)
        assert sum(1 for _ in store.datasets.examples(dataset)) == 5_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # the examples are 10 MB together
