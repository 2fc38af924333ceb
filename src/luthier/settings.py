"""What the environment decides: where things lie, and the few choices that hold for a whole installation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator

from luthier.errors import InputError
from luthier.llm.machine_memory import machine_memory
from luthier.records.base_model import EnginePrecision
from luthier.records.record import Record

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[kmgt]?i?b?)", re.IGNORECASE)
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Settings(Record):
    """The settings of an installation; read them with :func:`load_settings`.

    ``home`` holds the database and the artifacts. ``organisation`` stands in the names of tuned models. ``stand_ins``
    maps patterns of model names that clients ask for (``gpt-4o-mini*``) to base models; the first that fits counts.

    ``engine`` runs the models that are served: "openvino", the address of a server that speaks OpenAI's API, or the
    command that starts one (:mod:`luthier.llm.engine_servers`); ``engine_api_key`` is that server's.
    ``engine_precision`` is in which numbers engines here compute, ``engine_memory`` how many bytes of memory they may
    hold in all, and ``max_loaded`` how many models may be loaded at once; None leaves both to the pool of models.

    ``requests_per_minute`` and ``tokens_per_minute`` bound every key that has no bounds of its own; None leaves it
    free.
    ``max_requests`` is how many answers one engine makes or holds waiting at once, and ``request_seconds`` how long a
    request may take.
    ``webhook_targets`` says where webhooks may be sent: "any" address, or "public" ones alone.
    """

    home: Path
    stand_ins: dict[str, str] = Field(default_factory=dict)
    organisation: str = Field("local", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    engine: str = "openvino"
    engine_api_key: str | None = None
    engine_precision: EnginePrecision = "auto"
    engine_memory: int | None = Field(None, gt=0)
    max_loaded: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    max_requests: int = Field(256, ge=1)
    request_seconds: float = Field(600, gt=0)
    webhook_targets: Literal["any", "public"] = "any"

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, engine: str) -> str:
        if engine == "openvino" or engine.startswith(("http://", "https://")) or "{port}" in engine:
            return engine
        raise ValueError("it is neither 'openvino', nor an address, nor a command with {port} in it")


def load_settings() -> Settings:
    """Read ``LUTHIER_HOME``, ``LUTHIER_ORGANISATION``, ``LUTHIER_STAND_INS`` (``pattern=base,…``), ``LUTHIER_ENGINE``,
    ``LUTHIER_ENGINE_API_KEY``, ``LUTHIER_ENGINE_PRECISION``, ``LUTHIER_ENGINE_MEMORY`` (such as ``12GiB`` or ``60%``),
    ``LUTHIER_MAX_LOADED``, ``LUTHIER_REQUESTS_PER_MINUTE``, ``LUTHIER_TOKENS_PER_MINUTE``, ``LUTHIER_MAX_REQUESTS``,
    ``LUTHIER_REQUEST_SECONDS`` and ``LUTHIER_WEBHOOK_TARGETS``.

    Raises:
        InputError: a value breaks its rule.
    """
    home = os.environ.get("LUTHIER_HOME")
    values = {
        "home": Path(home).expanduser().absolute() if home else Path(platformdirs.user_data_dir("luthier")),
        "organisation": os.environ.get("LUTHIER_ORGANISATION"),
        "stand_ins": _pairs(os.environ.get("LUTHIER_STAND_INS", "")),
        "engine": os.environ.get("LUTHIER_ENGINE"),
        "engine_api_key": os.environ.get("LUTHIER_ENGINE_API_KEY"),
        "engine_precision": os.environ.get("LUTHIER_ENGINE_PRECISION"),
        "engine_memory": _bytes(os.environ.get("LUTHIER_ENGINE_MEMORY", "")),
        "max_loaded": os.environ.get("LUTHIER_MAX_LOADED"),
        "requests_per_minute": os.environ.get("LUTHIER_REQUESTS_PER_MINUTE"),
        "tokens_per_minute": os.environ.get("LUTHIER_TOKENS_PER_MINUTE"),
        "max_requests": os.environ.get("LUTHIER_MAX_REQUESTS"),
        "request_seconds": os.environ.get("LUTHIER_REQUEST_SECONDS"),
        "webhook_targets": os.environ.get("LUTHIER_WEBHOOK_TARGETS"),
    }
    try:
        return Settings.model_validate({key: value for key, value in values.items() if value})
    except ValidationError as error:
        problems = [_problem(str(found["loc"][0]), found["msg"]) for found in error.errors()]
        raise InputError("The settings in the environment are not valid.", problems=problems) from error


def _problem(field: str, rule: str) -> str:
    variable = f"LUTHIER_{field.upper()}"
    return f"{variable} = {os.environ.get(variable)!r}: {rule.removeprefix('Value error, ')}"


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for pattern, equals, base in pairs:
        if not (pattern.strip() and equals and base.strip()):
            raise InputError(
                f"LUTHIER_STAND_INS has {pattern + equals + base!r}, which is not pattern=base.",
                hint="for example LUTHIER_STAND_INS='gpt-4o-mini*=smollm2-135m,gpt-*=smollm2-135m'",
            )
    return {pattern.strip(): base.strip() for pattern, _, base in pairs}


def _bytes(text: str) -> int | None:
    """Return a size such as ``12GiB``, ``800 MB`` or ``60%`` of the memory of this machine or container in bytes."""
    if not text.strip():
        return None
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"LUTHIER_ENGINE_MEMORY is {text!r}, which is no size.", hint="for example 12GiB, or 60%")
    unit = match.group(2).lower()
    scale = machine_memory().total_bytes / 100 if unit == "%" else UNITS[unit.removesuffix("b").removesuffix("i")]
    return int(float(match.group(1)) * scale)
