"""One database: SQLite in WAL mode under the home, or PostgreSQL by URL. Opens it, migrates it, begins transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from luthier.errors import ConflictError, DiskFullError

HEAD = "0003"
BUSY_TIMEOUT_MS = 30_000
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """A migrated database.

    Args:
        url: An SQLAlchemy URL, such as ``sqlite:////home/me/luthier.db``.
    """

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url)
        if self.engine.dialect.name == "sqlite":
            _prepare_sqlite(self.engine)
        self._migrate()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Begin a transaction that writes: all of it happens, or nothing. SQLite takes its one write lock at once.

        Raises:
            DiskFullError: the disk is full.
        """
        with (
            _full_disk_is_an_error(),
            self.engine.connect().execution_options(luthier_write=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Begin a transaction that only reads, and sees one state of the database."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _migrate(self) -> None:
        with self.read() as connection:
            current = _version(connection)
        if current == HEAD:
            return
        from alembic import command  # slow to import, and needed only when there is something to migrate
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self.write() as connection:
            current = _version(connection)  # another process may have migrated while this one waited
            if current is not None and current > HEAD:
                raise ConflictError(
                    f"The database has version {current}, which is newer than this Luthier's {HEAD}.",
                    hint="install the newer Luthier, or use another LUTHIER_HOME",
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


@contextmanager
def _full_disk_is_an_error() -> Iterator[None]:
    try:
        yield
    except sa.exc.OperationalError as error:
        if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
            raise
        raise DiskFullError(
            "The disk is full: the database cannot grow.", hint="free some space, then go on with: luthier run resume"
        ) from error


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _prepare_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("luthier_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
