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

    ``home`` holds the database and the artifacts. ``organisation`` stands in the names of tuned models. ``stand_ins``
    maps patterns of model names that clients ask for (``gpt-4o-mini*``) to base models; the first that fits counts.
    """

    home: Path
    stand_ins: dict[str, str] = Field(default_factory=dict)
    organisation: str = Field("local", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")


def load_settings() -> Settings:
    """Read ``LUTHIER_HOME``, ``LUTHIER_ORGANISATION`` and ``LUTHIER_STAND_INS`` (``pattern=base,…``).

    Raises:
        InputError: a value breaks its rule.
    """
    home = os.environ.get("LUTHIER_HOME")
    values = {
        "home": Path(home).expanduser().absolute() if home else Path(platformdirs.user_data_dir("luthier")),
        "organisation": os.environ.get("LUTHIER_ORGANISATION"),
        "stand_ins": _pairs(os.environ.get("LUTHIER_STAND_INS", "")),
    }
    try:
        return Settings.model_validate({key: value for key, value in values.items() if value})
    except ValueError as error:
        raise InputError(f"A LUTHIER_ environment variable is not valid: {error}") from error


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for pattern, equals, base in pairs:
        if not (pattern.strip() and equals and base.strip()):
            raise InputError(
                f"LUTHIER_STAND_INS has {pattern + equals + base!r}, which is not pattern=base.",
                hint="for example LUTHIER_STAND_INS='gpt-4o-mini*=smollm2-135m,gpt-*=smollm2-135m'",
            )
    return {pattern.strip(): base.strip() for pattern, _, base in pairs}
