"""API keys in the database: hashed, so that whoever reads the database cannot use them."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence

import sqlalchemy as sa

from luthier.errors import NotFoundError
from luthier.records.access import NO_RATES, ApiKey, Rates, Scope
from luthier.store.database import Database
from luthier.store.tables import api_keys

SECRET_PREFIX = "sk-luthier-"  # noqa: S105 - the part of a key that is no secret
SECRET_BYTES = 32
ENDING_LETTERS = 4


class KeyStore:
    """API keys in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._has_keys = False

    def add(self, name: str, project: str, scopes: Sequence[Scope], rates: Rates = NO_RATES) -> tuple[ApiKey, str]:
        """Make a key; return its record and its secret, which cannot be had again."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        key = ApiKey(
            id=f"key-{secrets.token_hex(4)}",
            name=name,
            project=project,
            scopes=tuple(scopes),
            ending=secret[-ENDING_LETTERS:],
            created_at=int(time.time()),
            rates=rates,
        )
        with self._database.write() as connection:
            row = {"id": key.id, "hash": _hash(secret), "record": key.model_dump(mode="json")}
            connection.execute(sa.insert(api_keys).values(**row))
        return key, secret

    def find(self, secret: str) -> ApiKey | None:
        """Return the key of a secret, unless there is none or it was revoked."""
        query = sa.select(api_keys.c.record).where(api_keys.c.hash == _hash(secret))
        with self._database.read() as connection:
            record = connection.execute(query).scalar()
        key = ApiKey.model_validate(record) if record is not None else None
        return None if key is None or key.revoked_at is not None else key

    def any(self) -> bool:
        """Whether there ever was a key; a revoked one counts, so that revoking the last one opens no door."""
        if not self._has_keys:  # asked for every request; once there is one, that stays so
            with self._database.read() as connection:
                self._has_keys = connection.execute(sa.select(api_keys.c.id).limit(1)).scalar() is not None
        return self._has_keys

    def all(self) -> list[ApiKey]:
        """Return all keys, revoked ones too."""
        with self._database.read() as connection:
            records = connection.execute(sa.select(api_keys.c.record)).scalars().all()
        return sorted((ApiKey.model_validate(record) for record in records), key=lambda key: key.created_at)

    def revoke(self, id: str) -> ApiKey:
        """End a key; the next request with it is refused.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._database.write() as connection:
            record = connection.execute(sa.select(api_keys.c.record).where(api_keys.c.id == id)).scalar()
            if record is None:
                raise NotFoundError(f"There is no key {id!r}.", hint="luthier key list")
            key = ApiKey.model_validate(record)
            if key.revoked_at is None:
                key = key.model_copy(update={"revoked_at": int(time.time())})
                change = sa.update(api_keys).where(api_keys.c.id == id).values(record=key.model_dump(mode="json"))
                connection.execute(change)
        return key


def _hash(secret: str) -> str:
    """Return the SHA-256 of a secret; its 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()
