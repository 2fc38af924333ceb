from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.errors import InputError, NotFoundError
from luthier.store.store import Store
from luthier.workflows.models import pull
from tests.cli.command import run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked(home: Path) -> None:
    secret = run("key", "create", "bot", "--project", "support", "--scope", "read").strip()
    assert secret.startswith("sk-luthier-")
    listed = run("key", "list", "--json")
    (key,) = json.loads(listed)
    assert (key["project"], key["scopes"], key["ending"]) == ("support", ["read"], secret[-4:])
    assert secret not in listed
    store = Store(home)
    assert store.keys.find(secret) is not None
    run("key", "revoke", key["id"])
    assert store.keys.find(secret) is None
    store.close()


def test_with_the_first_key_it_is_told_that_every_request_needs_one_from_now_on() -> None:
    first, second = (CliRunner().invoke(app, ["key", "create", name]).stderr for name in ("first", "second"))
    assert "from now on every request needs a key" in first
    assert "from now on" not in second


def test_a_wrong_scope_or_project_is_told() -> None:
    with pytest.raises(InputError, match="'foo' is not one of read, write, admin"):
        run("key", "create", "bot", "--scope", "foo")
    with pytest.raises(InputError, match="project name"):
        run("key", "create", "bot", "--project", "../up")
    with pytest.raises(NotFoundError, match="no key 'nobody'"):
        run("key", "revoke", "nobody")


def test_an_alias_is_pointed_shown_and_removed(home: Path, tiny_base: Path) -> None:
    store = Store(home)
    pull(store, str(tiny_base))
    store.close()
    run("model", "alias", "support@production", "tiny-base")
    (alias,) = json.loads(run("model", "alias", "--json"))
    assert (alias["name"], alias["model"]) == ("support@production", "tiny-base")
    with pytest.raises(NotFoundError):
        run("model", "alias", "support@production", "ft:nobody")
    with pytest.raises(InputError, match="base model"):
        run("model", "alias", "tiny-base", "tiny-base")
    run("model", "alias", "--remove", "support@production")
    assert json.loads(run("model", "alias", "--json")) == []
