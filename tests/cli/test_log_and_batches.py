from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.errors import InputError
from luthier.jobs.launch import submit
from luthier.records.batch import BatchRequest
from luthier.store.store import Store
from luthier.workflows.completions import keep_completion
from tests.cli.command import run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return Store(tmp_path / "home")


def test_the_log_of_a_project_becomes_a_dataset(store: Store) -> None:
    for number, good in enumerate(("yes", "no", "yes")):
        choice = {"message": {"content": f"It is {number}."}, "finish_reason": "stop"}
        completion = {"id": f"chatcmpl-{number}", "created": number, "model": "support", "choices": [choice]}
        request = {"messages": [{"role": "user", "content": f"number {number}"}], "metadata": {"good": good}}
        keep_completion(store, "acme", request, completion)
    options = ("--project", "acme", "--model", "support", "--metadata", "good=yes")
    assert "numbers@1: 2 examples taken, 0 rows left out." in run("dataset", "import-completions", "numbers", *options)
    made = json.loads(run("dataset", "import-completions", "numbers", "--project", "acme", "--json"))
    assert (made["version"], made["examples"], made["fields"]) == (2, 3, ["good"])
    with pytest.raises(InputError, match="none fits"):
        run("dataset", "import-completions", "numbers")
    with pytest.raises(InputError, match="KEY=VALUE"):
        run("dataset", "import-completions", "numbers", "--metadata", "good")


def test_a_batch_is_a_run_that_is_listed_paused_and_left_to_the_server_when_it_is_resumed(store: Store) -> None:
    batch = submit(store, "batch", BatchRequest(input_file_id="file-1", endpoint="/v1/embeddings"))
    assert [one["id"] for one in json.loads(run("run", "list", "--json"))] == [batch.id]
    assert "paused" in run("run", "pause", batch.id)
    assert "luthier up" in run("run", "resume", batch.id)
    assert store.runs.get(batch.id).status == "queued"
