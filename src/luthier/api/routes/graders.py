"""``/v1/fine_tuning/alpha/graders``: try a grader on one sample."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from luthier.api.loopback import call
from luthier.api.service import TheService, Writer
from luthier.api.streams import CLIENT_CLOSED_REQUEST, unless_disconnected
from luthier.workflows.graders import check_grader, read_grader, run_grader

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"])


class GraderRun(BaseModel):
    """A grader, and a sample that it is to grade; ``item`` is the row that the sample answers to."""

    model_config = ConfigDict(extra="allow")

    grader: dict[str, Any]
    model_sample: str
    item: dict[str, Any] | None = None


class GraderCheck(BaseModel):
    """A grader that is to be looked at."""

    model_config = ConfigDict(extra="allow")

    grader: dict[str, Any] = Field(description="any of OpenAI's graders")


@router.post("/run")
async def try_grader(body: GraderRun, request: Request, caller: Writer, service: TheService) -> Response:
    """Grade one sample."""
    ask = partial(call, request.app, caller, "POST")
    work = run_grader(service.store, ask, body.grader, body.model_sample, body.item or {})
    result = await unless_disconnected(request, work)
    return JSONResponse(result) if result is not None else Response(status_code=CLIENT_CLOSED_REQUEST)


@router.post("/validate")
async def validate_grader(body: GraderCheck, caller: Writer, service: TheService) -> dict[str, Any]:
    """Say whether a grader can be used here."""
    await check_grader(service.store, read_grader(body.grader, ("grader",)), ("grader",))
    return {"grader": body.grader}
