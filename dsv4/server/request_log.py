"""Ids of requests, in answers and in the log, which is text or JSON lines. No keys and no answers are in it, and
prompts only where they are asked for."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FORMATS = ("text", "json")
_ID_HEADERS = ("x-request-id", "request-id")  # read by OpenAI's SDK and by Anthropic's
_ALLOWED_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_request_id: ContextVar[str | None] = ContextVar("dsv4_request_id", default=None)

logger = logging.getLogger("dsv4.requests")
_prompts = logging.getLogger("dsv4.prompts")


class RequestIdMiddleware:
    """Gives every request an id, its client's own if that is a plain one, and logs its end at level INFO."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ALLOWED_ID.fullmatch(given) else _new_id()
        _request_id.set(request_id)
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in _ID_HEADERS:
                    headers[name] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            seconds = round(time.monotonic() - began, 3)
            fields = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": seconds}
            logger.info("%(method)s %(path)r %(status)d in %(seconds).3f s", fields, extra={"fields": fields})


def new_id_headers() -> list[tuple[str, str]]:
    """Headers with an id for the answer to a request whose head cannot be read."""
    request_id = _new_id()
    return [(name, request_id) for name in _ID_HEADERS]


def _new_id() -> str:
    return f"req_{uuid.uuid4().hex}"


class RequestIdFilter(logging.Filter):
    """Notes the id of the running request in each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = _request_id.get()
        return True


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        line = f"{_time(record)} {record.levelname} {record.name}: {super().format(record)}"
        return line if request_id is None else f"{line} [{request_id}]"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and request_id, error and further fields where known."""

    def format(self, record: logging.LogRecord) -> str:
        shown: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if getattr(record, "request_id", None) is not None:
            shown["request_id"] = vars(record)["request_id"]
        shown |= getattr(record, "fields", {})
        if record.exc_info:
            shown["error"] = self.formatException(record.exc_info)
        elif record.exc_text:
            shown["error"] = record.exc_text
        return json.dumps(shown)


def log_prompt(answer_id: str, text: str) -> None:
    """Writes a prompt, as the model reads it, to the log."""
    fields = {"answer_id": answer_id, "prompt": text}
    _prompts.info("prompt of %(answer_id)s: %(prompt)r", fields, extra={"fields": fields})


def configure_logging(form: str, requests: bool, prompts: bool = False) -> None:
    """Writes the log of this process to stderr. `form`: one of FORMATS; `requests`: a line for every request too;
    `prompts`: lines of `log_prompt`.
    """
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO if requests else logging.WARNING)
    _prompts.setLevel(logging.INFO if prompts else logging.WARNING)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
