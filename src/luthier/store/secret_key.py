"""The home's own secret: one file, from which the secrets of single things are derived.

What is derived is never stored. So the database alone, a backup of it, or a list of it shows no secret that the service
signs with, and there is nothing to decrypt.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from luthier.errors import IntegrityError

KEY_BYTES = 32
MODE = 0o600


class SecretKey:
    """A file of random bytes that only its owner may read; it is made when it is first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def derive(self, purpose: str) -> bytes:
        """Return 32 bytes that belong to a purpose: HMAC-SHA256 under the key. The same ones every time.

        Raises:
            IntegrityError: the file is not what was written.
        """
        return hmac.new(self._key(), purpose.encode(), hashlib.sha256).digest()

    def _key(self) -> bytes:
        if not self.path.exists():
            self._make()
        key = self.path.read_bytes()
        if len(key) != KEY_BYTES:
            raise IntegrityError(
                f"{self.path} has {len(key)} bytes instead of {KEY_BYTES}.",
                hint="put it back from a backup; without it, delete it, and rotate the webhooks' secrets",
            )
        return key

    def _make(self) -> None:
        """Write the file whole or not at all; of two processes that do, one wins."""
        staged = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                self.path.hardlink_to(staged)
        finally:
            staged.unlink()
