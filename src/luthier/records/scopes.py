"""The words that the command line's help needs of access: without pydantic, so that help answers at once."""

from __future__ import annotations

from typing import Literal, get_args

DEFAULT_PROJECT = "default"
Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
