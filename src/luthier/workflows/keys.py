"""Keys: who may call the service, for which project, and with which rights."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.errors import InputError
from luthier.records.access import NO_RATES, SCOPES, ApiKey, Rates, Scope
from luthier.store.store import Store
from luthier.store.versions import check_name


def create_key(
    store: Store, name: str, project: str, scopes: Sequence[Scope], rates: Rates = NO_RATES
) -> tuple[ApiKey, str]:
    """Make a key; return its record and its secret, which is shown now and never again.

    Raises:
        InputError: a name is not valid, or there is no scope.
    """
    check_name(project, "project")
    if not name or len(name) > 64:
        raise InputError(f"The key name {name!r} is not 1 to 64 letters.")
    if not scopes:
        raise InputError(f"A key needs at least one scope of {', '.join(SCOPES)}.")
    return store.keys.add(name, project, scopes, rates)
