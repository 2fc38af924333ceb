"""``/v1/models``: base models, the project's tuned ones, and its aliases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter

from luthier.api.service import Reader, TheService, Writer
from luthier.errors import InputError, NotFoundError, did_you_mean
from luthier.serve.api_error import ApiError, model_not_found
from luthier.serve.pool import ServedModelInfo
from luthier.workflows.models import delete_model

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(caller: Reader, service: TheService) -> dict[str, Any]:
    """List the models that can be asked."""
    return {"object": "list", "data": [_model(info) for info in service.pool.models(caller.project)]}


@router.get("/{model:path}")
def retrieve_model(model: str, caller: Reader, service: TheService) -> dict[str, Any]:
    """Describe one model."""
    models = {info.name: info for info in service.pool.models(caller.project)}
    if model in models:
        return _model(models[model])
    try:
        meant = service.pool.meant(model, caller.project)  # a stand-in, which is not listed
    except (NotFoundError, InputError) as error:
        message = f"The model {model!r} does not exist.{did_you_mean(model, models)}"
        raise model_not_found(message) from error
    return _model(replace(models[meant], name=model, root=models[meant].root or meant))


@router.delete("/{model:path}")
def remove_model(model: str, caller: Writer, service: TheService) -> dict[str, Any]:
    """Delete a tuned model, or an alias."""
    if model in {base.id for base in service.store.models.bases()}:
        raise ApiError(403, f"{model!r} is a base model, which all projects use; it is not deleted here.", code="base")
    try:
        delete_model(service.store, caller.project, model)
    except NotFoundError as error:
        raise model_not_found(str(error)) from error
    return {"id": model, "object": "model", "deleted": True}


def _model(info: ServedModelInfo) -> dict[str, Any]:
    model = {"id": info.name, "object": "model", "created": info.created, "owned_by": info.owned_by}
    return model | ({"root": info.root, "parent": info.root} if info.root else {})
