"""Sharing tuned models and checkpoints with other projects, which may then ask them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.errors import InputError, NotFoundError
from luthier.records.fine_tuning import CheckpointPermission, SharedModel
from luthier.records.stored import Page, new_id, now
from luthier.store.collection import Order
from luthier.store.store import Store
from luthier.workflows.checkpoints import checkpoint_named, is_checkpoint


def share(store: Store, project: str, model: str, project_ids: Sequence[str]) -> list[CheckpointPermission]:
    """Let other projects ask a checkpoint or tuned model of a project; a permission that is there stays.

    Raises:
        NotFoundError: the project has no such model.
        InputError: it is to be shared with itself.
    """
    name = _own(store, project, model)
    if project in project_ids:
        raise InputError(f"The project {project!r} has this model already; share it with others.")
    known = {permission.project_id: permission for permission in store.permissions.all(project, parent=name)}
    return [known.get(other) or _grant(store, project, name, other) for other in dict.fromkeys(project_ids)]


def permissions(
    store: Store,
    project: str,
    model: str,
    *,
    with_project: str | None = None,
    after: str | None = None,
    limit: int = 10,
    order: Order = "desc",
) -> Page[CheckpointPermission]:
    """Return a part of the permissions of a checkpoint or tuned model.

    Raises:
        NotFoundError: the project has no such model, or it has no permission ``after``.
    """
    name = _own(store, project, model)
    found = list(store.permissions.all(project, parent=name, order=order))
    found = [one for one in found if with_project in (None, one.project_id)]
    ids = [one.id for one in found]
    if after is not None and after not in ids:
        raise NotFoundError(f"There is no permission {after!r}.")
    rest = found[ids.index(after) + 1 :] if after is not None else found
    return Page(items=tuple(rest[:limit]), has_more=len(rest) > limit)


def unshare(store: Store, project: str, model: str, permission_id: str) -> None:
    """Take a permission back: from now on the other project has no such model.

    Raises:
        NotFoundError: there is no such model or permission.
    """
    name = _own(store, project, model)
    permission = store.permissions.get(project, permission_id)
    if permission.model != name:
        raise NotFoundError(f"There is no permission {permission_id!r} of {name!r}.")
    store.permissions.remove(project, permission_id)
    for shared in list(store.shared_models.all(permission.project_id)):
        if shared.permission == permission_id:
            store.shared_models.remove(shared.project, shared.id)


def owner_of(store: Store, project: str, model: str) -> str:
    """Return the project whose model of that name a project asks: its own, or one that shares it."""
    shared = store.shared_models.page(project, model=model, limit=100).items
    return next((one.owner for one in shared if _counts(store, one)), project)


def models_shared_with(store: Store, project: str) -> Iterator[SharedModel]:
    """Yield what other projects let a project ask."""
    return (shared for shared in store.shared_models.all(project) if _counts(store, shared))


def _own(store: Store, project: str, model: str) -> str:
    if is_checkpoint(model):
        return checkpoint_named(store, project, model).model
    return store.models.get(model, project=project).name


def _grant(store: Store, project: str, model: str, other: str) -> CheckpointPermission:
    permission = CheckpointPermission(
        id=new_id("cp_"), project=project, created_at=now(), parent=model, model=model, project_id=other
    )
    shared = SharedModel(
        id=new_id("shared_"),
        project=other,
        created_at=permission.created_at,
        model=model,
        owner=project,
        permission=permission.id,
    )
    with store.database.write() as connection:
        store.permissions.add_in(connection, permission)
        store.shared_models.add_in(connection, shared)
    return permission


def _counts(store: Store, shared: SharedModel) -> bool:
    try:
        return store.permissions.get(shared.owner, shared.permission).project_id == shared.project
    except NotFoundError:
        return False
