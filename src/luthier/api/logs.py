"""What the service writes to its log: one line a request and a delivery, as text or as JSON.

Prompts and answers are no part of a line. ``--log-prompts`` adds the bodies of requests, see :class:`PromptLog`.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.api.requests import Exchange
from luthier.api.service import REQUEST_ID

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})
MAX_PROMPT_BYTES = 2**16

log = logging.getLogger("luthier.requests")


def configure_logs(format: str = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Have everything written to a stream, standard error by default: the service's lines from a level on, and the
    warnings of libraries.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("luthier").setLevel(level.upper())


class JsonLines(logging.Formatter):
    """One JSON object a line; what a line is about stands under names of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """A line for people: time, level, message, and name=value of the rest."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line, and below it a traceback where there is one."""
        rest = "".join(f" {name}={_plain(value)}" for name, value in _extra(record).items() if value is not None)
        line = f"{_time(record)} {record.levelname.lower()} {record.getMessage()}{rest}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_request(exchange: Exchange) -> None:
    """Write the line of a request that is over."""
    usage, caller = exchange.usage, exchange.caller
    level = logging.DEBUG if exchange.route in QUIET_ROUTES else logging.INFO
    extra = {
        "request_id": exchange.id,
        "method": exchange.method,
        "route": exchange.route,
        "path": exchange.scope["path"],
        "status": exchange.status,
        "seconds": round(exchange.seconds, 4),
        "key": caller.key if caller else None,
        "project": caller.project if caller else None,
        "internal": exchange.internal or None,
    }
    if usage.model is not None:
        first = usage.first_token_seconds
        extra |= {
            "model": usage.model,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "first_token_seconds": round(first, 4) if first is not None else None,
        }
    log.log(level, "request", extra=extra)


class PromptLog:
    """Write what is asked of models into the log, when the operator wants that: the JSON bodies of requests."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and keep the beginning of its body for the log."""

        async def receive_logged() -> Message:
            message = await receive()
            if message["type"] == "http.request" and message.get("body"):
                text = message["body"][:MAX_PROMPT_BYTES].decode("utf-8", "replace")
                log.info("prompt", extra={"request_id": scope.get(REQUEST_ID), "prompt": text})
            return message

        is_json = any(name == b"content-type" and b"json" in value for name, value in scope.get("headers", ()))
        await self.app(scope, receive_logged if is_json else receive, send)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in STANDARD}


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or not text.isprintable() else text
