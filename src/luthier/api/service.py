"""What all routes share: the running service, and who calls it with which scope."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from luthier.records.access import NO_RATES, Caller, Rates, Scope
from luthier.serve.api_error import ApiError
from luthier.serve.pool import ModelPool
from luthier.serve.webhooks import Targets
from luthier.store.store import Store

MAX_BODY_BYTES = 10 * 2**20
MAX_FILE_BYTES = 512 * 2**20
# What is kept in a request's scope.
CALLER = "luthier.caller"  # who calls; there from the beginning where the service calls itself
REQUEST_ID = "luthier.request_id"
ADMISSION = "luthier.admission"  # what its key's bounds said


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; beyond it, the answer is 413."""

    body_bytes: int = MAX_BODY_BYTES
    file_bytes: int = MAX_FILE_BYTES


@dataclass(frozen=True)
class Service:
    """A running service.

    ``api_key`` is one key of the default project that is not in the database, for the environment of a container.
    ``processes`` is how many runs of the queue this service executes at once in processes of their own; 0 leaves the
    queue to others. ``resident_runs`` is how many batches and runs of evals it executes itself meanwhile. ``rates``
    bound every key that has no bounds of its own. ``log_prompts`` writes what models are asked into the log.
    """

    store: Store
    pool: ModelPool
    api_key: str | None = None
    limits: Limits = Limits()
    processes: int = 0
    resident_runs: int = 4
    rates: Rates = NO_RATES
    webhook_targets: Targets = "any"
    log_prompts: bool = False

    @property
    def executes_runs(self) -> bool:
        """Whether this service takes runs from the queue."""
        return self.processes > 0

    def caller(self, authorization: str) -> Caller:
        """Return who sends an ``Authorization`` header. Without any key in the service, everybody may do everything.

        Raises:
            ApiError: 401, where the key is missing or wrong.
        """
        if self.api_key is None and not self.store.keys.any():
            return Caller()
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() == "bearer" and secret:
            if self.api_key is not None and hmac.compare_digest(secret.encode(), self.api_key.encode()):
                return Caller(key="environment")
            key = self.store.keys.find(secret)
            if key is not None:
                return Caller(project=key.project, scopes=key.scopes, key=key.id, rates=key.rates)
        raise ApiError(
            401, "The API key is missing or wrong. luthier key create NAME makes one.", code="invalid_api_key"
        )


def service_of(request: Request) -> Service:
    """Return the service that a request came to."""
    service: Service = request.app.state.service
    return service


def _caller_with(scope: Scope) -> Callable[[Request], Awaitable[Caller]]:
    async def caller(request: Request) -> Caller:
        known: Caller = request.scope[CALLER]  # luthier.api.identity
        if not known.may(scope):
            message = f"This key may not do that: it has the scopes {', '.join(known.scopes)}, and this needs {scope}."
            raise ApiError(403, message, code="insufficient_scope")
        return known

    caller.__name__ = f"caller_with_{scope}"
    return caller


reads, writes, administers = _caller_with("read"), _caller_with("write"), _caller_with("admin")
# Every route has a parameter of one of these types: it says who calls, and refuses whoever has no such scope.
Reader = Annotated[Caller, Depends(reads)]
Writer = Annotated[Caller, Depends(writes)]
Admin = Annotated[Caller, Depends(administers)]
TheService = Annotated[Service, Depends(service_of)]
