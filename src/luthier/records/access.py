"""Who may do what: projects, keys with scopes, and the caller that a request comes from."""

from __future__ import annotations

from pydantic import Field

from luthier.records.record import Record
from luthier.records.scopes import DEFAULT_PROJECT, SCOPES, Scope

__all__ = ["DEFAULT_PROJECT", "NO_RATES", "SCOPES", "ApiKey", "Caller", "Rates", "Scope"]


class Rates(Record):
    """How much a key may have in a minute: None takes the service's default, 0 is no bound."""

    requests_per_minute: int | None = Field(None, ge=0)
    tokens_per_minute: int | None = Field(None, ge=0)


NO_RATES = Rates()


class ApiKey(Record):
    """A key as it is kept: without its secret, of which only the SHA-256 and the last letters are known.

    ``read`` lets its holder look at things and ask models; ``write`` lets it also make, change and delete; ``admin``
    lets it do what concerns the whole project, such as its webhooks. Times are Unix seconds.
    """

    id: str
    name: str
    project: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    scopes: tuple[Scope, ...]
    ending: str
    created_at: int
    revoked_at: int | None = None
    rates: Rates = NO_RATES


class Caller(Record):
    """Who makes a request: everything it sees and makes belongs to its project. ``key`` is None without keys."""

    project: str = DEFAULT_PROJECT
    scopes: tuple[Scope, ...] = SCOPES
    key: str | None = None
    rates: Rates = NO_RATES

    def may(self, scope: Scope) -> bool:
        """Whether this caller has a scope, or a higher one."""
        return any(SCOPES.index(own) >= SCOPES.index(scope) for own in self.scopes)
