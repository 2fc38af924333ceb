"""What the command line says of a tuned model and does with it: a small classifier, made by the command line itself."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.errors import ConflictError, InputError, NotFoundError
from luthier.jobs.launch import submit
from luthier.store.store import Store
from luthier.workflows.checkpoints import keep_checkpoint
from luthier.workflows.material import TrainRequest
from luthier.workflows.models import pull
from tests.cli.command import run

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "training.md"
WORDS = ("order", "message")
TRAIN = "train sayings -b tiny-encoder -m classification --mode full -o columns.label=label -o columns.text=text"
FAST = "-o epochs=8 -o batch_size=8 -o learning_rate=1e-2 -o precision=float32"


@dataclass(frozen=True)
class Classifier:
    """A home with a classifier in it, its name, and what ``luthier train`` printed."""

    store: Store
    name: str
    printed: str


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Iterator[Classifier]:
    folder = tmp_path_factory.mktemp("classifier")
    with (folder / "sayings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{WORDS[i % 2]} number {i}", WORDS[i % 2]] for i in range(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(folder / "home"))
        patch.setenv("COLUMNS", "80")
        store = Store(folder / "home")
        pull(store, str(tiny_encoder))
        run("dataset", "import", str(folder / "sayings.csv"))
        run("dataset", "split", "sayings", "--near", "0")
        printed = run(*TRAIN.split(), *FAST.split())
        yield Classifier(store, store.models.all()[0].name, printed)
        store.close()


def test_what_is_printed_and_documented_for_a_classifier_works_as_it_stands(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, printed = classifier.printed.partition("Next:")
    show, export = [line.strip().removeprefix("luthier ").split() for line in printed.strip().splitlines()]
    assert classifier.name in run(*show)
    assert "merged" in run(*export)
    (snippet,) = re.findall(r"```python\n(from transformers.*?)```", DOCUMENTATION.read_text("utf-8"), re.DOTALL)
    program = snippet.replace("My card has not arrived yet", "order number 7 " + "and more " * 100)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'label': 'order'" in answer
    with pytest.raises(InputError, match="has no form 'gguf-f16'; it has merged"):
        run("model", "export", classifier.name, "--to", "elsewhere")


def test_a_classifier_is_shown_with_what_it_was_made_of_and_nothing_else(classifier: Classifier) -> None:
    shown = dict(re.findall(r"^ (\S+(?: \S+)*)  +(.*?) *$", run("model", "show", classifier.name), re.MULTILINE))
    assert shown["template"] == "none: the dataset holds fields"
    assert (shown["method"], shown["mode"], shown["epochs"]) == ("classification", "full", "8.0")
    assert not [name for name in shown if "lora" in name]
    assert "{" not in "".join(shown.values())
    assert "None" not in shown.values()


# This one is the last of the file, for the others need the model.


def test_a_model_is_deleted_when_that_is_confirmed(classifier: Classifier, tmp_path: Path) -> None:
    store, name = classifier.store, classifier.name
    model = store.models.get(name)
    (tmp_path / "adapter.bin").write_bytes(bytes(1000))
    keep_checkpoint(store, store.runs.get(model.run_id), model.base, name, tmp_path, 3, {})
    run("model", "alias", "words@production", name)
    with pytest.raises(InputError, match="'tiny-encoder' is a base model"):
        run("model", "delete", "tiny-encoder", "--yes")
    with pytest.raises(NotFoundError, match="no tuned model 'nothing'"):
        run("model", "delete", "nothing")
    refused = CliRunner().invoke(app, ["model", "delete", name], input="n\n")
    assert refused.exit_code == 1
    assert f"Delete {name} and the aliases words@production? That frees" in refused.stderr
    assert store.models.get(name) == model
    with pytest.raises(ConflictError, match="'sayings' is needed") as kept:
        run("dataset", "delete", "sayings", "--yes")
    assert kept.value.problems == (name,)
    further = submit(store, "train", TrainRequest(base=name, dataset=model.dataset))
    with pytest.raises(ConflictError, match="start from the adapter") as kept:
        run("model", "delete", name, "--yes")
    assert kept.value.problems == (further.id,)
    run("run", "cancel", further.id)
    before = disk_bytes(store)
    base_folder = store.models.base_folder(store.models.base("tiny-encoder"))
    told = json.loads(run("model", "delete", name.rsplit(":", 1)[-1], "--yes", "--json"))
    assert (told["deleted"], told["aliases"]) == (name, ["words@production"])
    assert told["freed_bytes"] == before - disk_bytes(store) > 1000
    assert list(store.home.rglob("*.safetensors")) == [base_folder / "model.safetensors"]
    assert store.models.all() == []
    assert store.models.aliases("default") == []
    assert store.datasets.get(model.dataset).content_hash == model.dataset_hash
    delete_its_dataset(store, model.dataset)


def delete_its_dataset(store: Store, reference: str) -> None:
    waiting = submit(store, "train", TrainRequest(base="tiny-encoder", dataset=reference))
    with pytest.raises(ConflictError, match="'sayings' is needed") as kept:
        run("dataset", "delete", "sayings", "--yes")
    assert kept.value.problems == (waiting.id,)
    store.runs.claim("somebody", 60.0, lambda owner: False, waiting.id)
    store.runs.finish(waiting.id, "somebody", "failed", error="broken")  # it can still be resumed
    with pytest.raises(ConflictError, match="'sayings' is needed"):
        run("dataset", "delete", "sayings", "--yes")
    run("run", "cancel", waiting.id)
    with pytest.raises(InputError, match="with all its versions"):
        run("dataset", "delete", reference)
    with pytest.raises(NotFoundError, match="Did you mean 'sayings'"):
        run("dataset", "delete", "saying")
    refused = CliRunner().invoke(app, ["dataset", "delete", "sayings"], input="n\n")
    assert refused.exit_code == 1
    assert "Delete sayings@1, sayings@2? That frees" in refused.stderr
    before = disk_bytes(store)
    told = json.loads(run("dataset", "delete", "sayings", "--yes", "--json"))
    assert told == {"deleted": "sayings", "freed_bytes": before - disk_bytes(store)}
    assert told["freed_bytes"] > 1000
    assert store.datasets.all() == []


def disk_bytes(store: Store) -> int:
    return sum(path.stat().st_size for path in store.home.rglob("*") if path.is_file() and ".db" not in path.name)
