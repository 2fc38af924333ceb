"""``/openapi.json``: what FastAPI knows of the routes, and what holds for all of them: keys, errors, request ids."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import luthier

Dict = dict[str, Any]
ERROR = {"$ref": "#/components/schemas/Error"}
TEXT: Dict = {"schema": {"type": "string"}}
BYTES: Dict = {"schema": {"type": "string", "format": "binary"}}
EVENTS: Dict = {  # each of them, as OpenAI describes its streams
    "schema": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
}
# What a route answers beside or instead of JSON.
STREAMED = {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
CONTENTS = {"/v1/files/{file_id}/content": {"application/octet-stream": BYTES, "text/plain": TEXT}}
FILTERED_BY_METADATA = {"/v1/fine_tuning/jobs", "/v1/chat/completions"}
METADATA_FILTER = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}
ALWAYS = {
    "400": "A value breaks its rule; `param` names it.",
    "401": "The key is missing or wrong.",
    "403": "The key has not the scope.",
    "404": "There is no such thing, or it belongs to another project.",
    "429": "The key has nothing left this minute, or the service is busy; `retry-after` says when to come again.",
    "500": "A bug; the log has its traceback under the request's id.",
    "503": "An engine failed, or has no room.",
}
WITH_CHANGES = {"409": "The state of a thing forbids it."}
WITH_BODY = {
    "504": "It took longer than a request may.",
    "408": "The body stopped coming.",
    "413": "The body is too large.",
    "415": "No route takes a body of this type.",
}
HEADERS: Dict = {"x-request-id": {"schema": {"type": "string"}, "description": "The request's id in the log."}}
ERROR_SCHEMA: Dict = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
READINESS: Dict = {
    "type": "object",
    "required": ["status", "reasons"],
    "properties": {"status": {"type": "string"}, "reasons": {"type": "array", "items": {"type": "string"}}},
}


def describe(app: FastAPI) -> None:
    """Have an application describe itself completely."""

    def openapi() -> Dict:
        if not app.openapi_schema:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _described(app: FastAPI) -> Dict:
    found = get_openapi(title=app.title, version=luthier.__version__, routes=app.routes)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"] = ERROR_SCHEMA
    meaning = "One of `luthier key list`; none where there is none."
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": meaning}}
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation)
    return found


def _complete(path: str, method: str, operation: Dict) -> None:
    """Add to one operation what FastAPI does not know."""
    responses = operation["responses"]
    responses.pop("422", None)
    success = next(response for status, response in responses.items() if status.startswith("2"))
    if path in CONTENTS:
        success["content"] = dict(CONTENTS[path])
    if method == "post" and path in STREAMED:
        success["content"]["text/event-stream"] = EVENTS
    if method == "get" and path in FILTERED_BY_METADATA:
        operation.setdefault("parameters", []).append(METADATA_FILTER)
    if path == "/ready":
        responses["503"] = _json("Not ready, and why.", READINESS)
    if path.startswith("/v1/") or path == "/metrics":
        operation["security"] = [{"key": []}]
        for status, meaning in _errors(method, operation).items():
            responses[status] = _json(meaning, ERROR)
    for response in responses.values():
        response["headers"] = HEADERS


def _json(meaning: str, schema: Dict) -> Dict:
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}


def _errors(method: str, operation: Dict) -> dict[str, str]:
    errors = ALWAYS | (WITH_CHANGES if method != "get" else {})
    return errors | (WITH_BODY if "requestBody" in operation else {})
