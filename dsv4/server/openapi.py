"""The OpenAPI document of the server: made of the routes, whose requests and answers have schemas."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import dsv4
from dsv4.server.schemas import AnthropicErrorAnswer, ErrorAnswer

PATH = "/openapi.json"
_REFERENCE = "#/components/schemas/{model}"
_SCHEMAS = "x-schemas"  # of an operation, until they are moved to the document's components
_ERRORS = {
    400: "What is wrong, and in which field",
    401: "No key, or a wrong one",
    403: "The request comes from a page, or for a host, that is not allowed",
    404: "There is no such model, or nothing of this id",
    408: "The request did not come in time",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The key is over a limit",
    500: "The server has failed",
    503: "The queue is full, the server is loading or stopping, or the engine has failed",
}


def operation(
    body: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    *,
    streams: bool = False,
    anthropic: bool = False,
    unavailable: type[BaseModel] | None = None,
    tag: str = "",
) -> dict[str, Any]:
    """Keywords of `add_api_route` that describe a route. A route without models takes or gives any JSON object.

    `streams`: the answer may be a stream of events. `anthropic`: errors are Anthropic's too. `unavailable`: another
    body of a 503.
    """
    content: dict[str, Any] = {"application/json": {"schema": _schema(answer)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = _schema(AnthropicErrorAnswer if anthropic else ErrorAnswer)
    errors: dict[int, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": error}}}
        for status, text in _ERRORS.items()
    }
    if unavailable is not None:
        errors[503]["content"]["application/json"]["schema"] = {"anyOf": [_schema(unavailable), error]}
    known = [
        model for model in (body, unavailable, answer, AnthropicErrorAnswer if anthropic else ErrorAnswer) if model
    ]
    _, schemas = models_json_schema([(model, "validation") for model in known], ref_template=_REFERENCE)
    extra: dict[str, Any] = {_SCHEMAS: schemas["$defs"]}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(body)}}}
    return {
        "responses": {200: {"description": "The answer", "content": content}, **errors},
        "openapi_extra": extra,
        "response_model": None,
        "tags": [tag] if tag else None,
    }


def install_openapi(app: FastAPI) -> None:
    """Makes `app.openapi` return the document, and serves it; there are no pages to show it."""
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(make_document(app))
        return document

    app.openapi = openapi


def make_document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title="dsv4",
        version=dsv4.__version__,
        description="DeepSeek's, OpenAI's and Anthropic's APIs over DeepSeek V4",
        routes=app.routes,
    )
    schemas: dict[str, Any] = {}
    for path in document["paths"].values():
        for method in path.values():
            schemas |= method.pop(_SCHEMAS, {})
            if method["responses"].pop("422", None) is not None:  # FastAPI's own: wrong parameters are a 400 here
                method["responses"].setdefault("400", {"description": _ERRORS[400]})
    document["components"] = {
        "schemas": dict(sorted(schemas.items())),
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }
    document["security"] = [{"bearer": []}, {"key": []}, {}]
    return document


def _schema(model: type[BaseModel] | None) -> dict[str, Any]:
    return {"type": "object"} if model is None else {"$ref": _REFERENCE.format(model=model.__name__)}
