"""What the environment decides: where things lie, and the few choices that hold for a whole installation."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
from pydantic import Field

from luthier.errors import InputError
from luthier.records.record import Record


class Settings(Record):
    """The settings of an installation; read them with :func:`load_settings`.

    ``home`` holds the database and the artifacts. ``organisation`` stands in the names of tuned models.
    """

    home: Path
    organisation: str = Field("local", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")


def load_settings() -> Settings:
    """Read ``LUTHIER_HOME`` and ``LUTHIER_ORGANISATION``; both have defaults.

    Raises:
        InputError: a value breaks its rule.
    """
    home = os.environ.get("LUTHIER_HOME")
    values = {
        "home": Path(home).expanduser().absolute() if home else Path(platformdirs.user_data_dir("luthier")),
        "organisation": os.environ.get("LUTHIER_ORGANISATION"),
    }
    try:
        return Settings.model_validate({key: value for key, value in values.items() if value})
    except ValueError as error:
        raise InputError(f"A LUTHIER_ environment variable is not valid: {error}") from error
