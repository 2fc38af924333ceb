from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.errors import EngineError, InputError, NotFoundError
from luthier.settings import load_settings
from luthier.store.store import Store
from tests.api.receiver import Receiver
from tests.cli.command import run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_endpoint_is_made_tested_shown_and_deleted() -> None:
    with Receiver() as receiver:
        secret = run("webhook", "create", receiver.url, "--event", "batch.failed", "--project", "acme").strip()
        assert secret.startswith("whsec_")
        listed = run("webhook", "list", "--project", "acme", "--json")
        (made,) = json.loads(listed)
        assert (made["url"], made["event_types"]) == (receiver.url, ["batch.failed"])
        assert secret not in listed
        assert json.loads(run("webhook", "list", "--json")) == []
        assert "answered 200" in run("webhook", "test", made["id"], "--project", "acme")
        assert json.loads(receiver.received[0].body)["type"] == "fine_tuning.job.succeeded"
        receiver.statuses[:] = [500]
        with pytest.raises(EngineError, match="status 500"):
            run("webhook", "test", made["id"], "--project", "acme")
    other = run("webhook", "rotate-secret", made["id"], "--project", "acme").strip()
    assert other.startswith("whsec_")
    assert other != secret
    with pytest.raises(NotFoundError):
        run("webhook", "delete", made["id"])
    run("webhook", "delete", made["id"], "--project", "acme")
    assert json.loads(run("webhook", "list", "--project", "acme", "--json")) == []


def test_what_an_endpoint_is_still_to_be_told_is_shown(home: Path) -> None:
    from luthier.workflows.deliveries import announce_runs

    secret = json.loads(run("webhook", "create", "http://127.0.0.1:1", "--json"))
    store = Store(home)
    store.runs.add("train-1", "train", {})
    store.runs.request("train-1", "cancel")
    announce_runs(store)
    store.close()
    (delivery,) = json.loads(run("webhook", "deliveries", secret["endpoint"]["id"], "--json"))
    assert (delivery["status"], delivery["subject"], delivery["attempts"]) == ("pending", "ftjob-1", 0)
    assert "pending" in run("webhook", "deliveries", secret["endpoint"]["id"])


def test_a_wrong_event_or_address_is_told() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'batch.completed'\?"):
        run("webhook", "create", "http://localhost", "--event", "batch.complete")
    with pytest.raises(InputError, match="not an http or https address"):
        run("webhook", "create", "example.com")


def test_a_key_has_its_own_bounds(home: Path) -> None:
    run("key", "create", "bot", "--requests-per-minute", "60", "--tokens-per-minute", "0")
    run("key", "create", "other")
    first, second = json.loads(run("key", "list", "--json"))
    assert first["rates"] == {"requests_per_minute": 60, "tokens_per_minute": 0}
    assert second["rates"] == {"requests_per_minute": None, "tokens_per_minute": None}
    result = CliRunner().invoke(app, ["key", "create", "bot", "--requests-per-minute", "-1"])
    assert result.exit_code != 0


def test_bounds_and_targets_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_REQUESTS_PER_MINUTE", "600")
    monkeypatch.setenv("LUTHIER_WEBHOOK_TARGETS", "public")
    monkeypatch.setenv("LUTHIER_ENGINE_PRECISION", "int8")
    settings = load_settings()
    assert settings.engine_precision == "int8"
    assert (settings.requests_per_minute, settings.tokens_per_minute) == (600, None)
    assert settings.webhook_targets == "public"


def test_bad_settings_are_told_together_with_their_variables_values_and_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_WEBHOOK_TARGETS", "everything")
    monkeypatch.setenv("LUTHIER_REQUESTS_PER_MINUTE", "many")
    monkeypatch.setenv("LUTHIER_ENGINE", "vllm")
    with pytest.raises(InputError) as caught:
        run("model", "list")
    assert sorted(caught.value.problems) == [
        "LUTHIER_ENGINE = 'vllm': it is neither 'openvino', nor an address, nor a command with {port} in it",
        "LUTHIER_REQUESTS_PER_MINUTE = 'many': Input should be a valid integer, unable to parse string as an integer",
        "LUTHIER_WEBHOOK_TARGETS = 'everything': Input should be 'any' or 'public'",
    ]
