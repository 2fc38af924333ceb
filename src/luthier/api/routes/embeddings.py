"""``/v1/embeddings``."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi import APIRouter, Request, Response

from luthier.api.service import Reader, Service, TheService
from luthier.api.streams import CLIENT_CLOSED_REQUEST, unless_disconnected
from luthier.errors import InputError, NotFoundError
from luthier.records.access import Caller
from luthier.serve.api_error import ApiError, model_not_found
from luthier.serve.embeddings import EmbeddingRequest, EncodingFormat, embed
from luthier.serve.pool import LoadedEncoder

router = APIRouter(prefix="/v1/embeddings", tags=["embeddings"])


@router.post("")
async def create_embeddings(body: EmbeddingRequest, request: Request, caller: Reader, service: TheService) -> Response:
    """Make a vector of each text."""
    async with AsyncExitStack() as resources:
        encoding = _encoding(body, request)
        answer = await unless_disconnected(request, _embedded(resources, service, caller, body, encoding))
    if answer is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(answer, media_type="application/json")


async def _embedded(
    resources: AsyncExitStack, service: Service, caller: Caller, body: EmbeddingRequest, encoding: EncodingFormat
) -> bytes:
    return await embed(body, await lease_encoder(resources, service, caller, body.model), encoding)


async def lease_encoder(resources: AsyncExitStack, service: Service, caller: Caller, name: str) -> LoadedEncoder:
    """Hold an encoder until the resources are freed; it is loaded if need be.

    Raises:
        ApiError: 404, where the caller has no model of that name; 400, where it is no encoder.
        EngineError: the model cannot be loaded.
        CapacityError: the model is larger than all engines may be.
        BusyError: all engines stayed busy.
    """
    try:
        return await resources.enter_async_context(service.pool.lease_encoder(name, caller.project))
    except NotFoundError as error:
        raise model_not_found(str(error)) from error
    except InputError as error:
        raise ApiError(400, str(error), param="model") from error


def _encoding(body: EmbeddingRequest, request: Request) -> EncodingFormat:
    """Return how the vectors are written.

    The ``openai`` package for Python asks for base64 where its user asks for nothing, takes numbers just as well, and
    in its strict mode refuses its own base64, because its type says numbers. So it gets numbers, unless its user reads
    the raw response.
    """
    headers = request.headers
    is_typed = headers.get("x-stainless-lang") == "python" and "x-stainless-raw-response" not in headers
    return "float" if is_typed else body.encoding_format or "float"
