"""One database, brought to its newest form by whoever opens it first; a transaction happens whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from luthier.errors import CapacityError, ConflictError
from luthier.store.database import HEAD, MIGRATIONS, Database
from luthier.store.store import Store
from luthier.store.tables import base_models, metadata, run_events

OPENER = """
import sys
from pathlib import Path
from luthier.store.store import Store

print("ready", flush=True)
sys.stdin.readline()
Store(Path(sys.argv[1])).runs.add(sys.argv[2], "train", {})
"""
WRITER = """
import sys, time
import sqlalchemy as sa
from luthier.store.database import Database
from luthier.store.tables import base_models

with Database(sys.argv[1]).write() as connection:
    connection.execute(sa.insert(base_models).values(id="half", record={}))
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'luthier.db'}"


def ids(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.execute(sa.select(base_models.c.id)).scalars())


def put(database: Database, model_id: str) -> None:
    with database.write() as connection:
        connection.execute(sa.insert(base_models).values(id=model_id, record={}))


def test_fresh_database_has_the_tables_that_the_code_uses(url: str) -> None:
    with Database(url).engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == HEAD


def test_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_database_opened_again_keeps_what_it_has(url: str) -> None:
    first = Database(url)
    put(first, "one")
    first.close()
    assert ids(Database(url)) == ["one"]


def test_database_of_a_newer_version_is_refused_and_left_alone(url: str) -> None:
    database = Database(url)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConflictError, match="has version 9999, which is newer") as caught:
        Database(url)
    assert caught.value.hint is not None
    with database.read() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "9999"


def test_processes_that_open_a_fresh_home_at_the_same_time_all_succeed(tmp_path: Path) -> None:
    home, pipe = tmp_path / "home", subprocess.PIPE
    command = [sys.executable, "-c", OPENER, str(home)]
    openers = [
        subprocess.Popen([*command, f"run-{number}"], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for number in range(5)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("go\n")
        opener.stdin.flush()
    outputs = [(opener.communicate()[1], opener.returncode) for opener in openers]
    assert outputs == [("", 0)] * 5
    assert len(Store(home).runs.all()) == 5


def test_transaction_that_fails_changes_nothing(url: str) -> None:
    database = Database(url)

    def put_and_fail() -> None:
        with database.write() as connection:
            connection.execute(sa.insert(base_models).values(id="one", record={}))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        put_and_fail()
    assert ids(database) == []


def test_process_killed_inside_a_transaction_changes_nothing_and_holds_nobody_up(url: str) -> None:
    database = Database(url)
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        assert ids(database) == []
        writer.send_signal(signal.SIGKILL)
    put(database, "after")
    assert ids(database) == ["after"]


def test_readers_go_on_during_a_write_and_see_one_state(url: str) -> None:
    database = Database(url)
    put(database, "one")
    with database.read() as reader:
        query = sa.select(sa.func.count()).select_from(base_models)
        assert reader.execute(query).scalar() == 1
        put(database, "two")
        assert reader.execute(query).scalar() == 1
    assert sorted(ids(database)) == ["one", "two"]


def test_full_disk_is_a_capacity_error_and_changes_nothing(url: str) -> None:
    database = Database(url)

    def put_too_much() -> None:
        with database.write() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
            connection.execute(sa.insert(base_models).values(id="large", record={"text": "x" * 1_000_000}))

    with pytest.raises(CapacityError, match="disk is full"):
        put_too_much()
    database.close()
    assert ids(Database(url)) == []


def test_event_of_an_unknown_run_is_refused_by_the_database(url: str) -> None:
    row = {"run_id": "none", "sequence": 1, "created_at": 0.0, "level": "info", "type": "message", "message": "m"}
    with pytest.raises(sa.exc.IntegrityError), Database(url).write() as connection:
        connection.execute(sa.insert(run_events).values(**row, data={}))
