"""Routes of a wire format: POST for an answer, streamed or whole, and POST for a token count."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv4.server.delivery import Delivery
from dsv4.server.errors import RequestError
from dsv4.server.openapi import operation
from dsv4.server.service import ChatService
from dsv4.server.users import key_of
from dsv4.server.wire_format import WireFormat


def format_router(wire_format: WireFormat, service: ChatService, delivery: Delivery) -> APIRouter:
    router = APIRouter()

    async def answer_request(request: Request) -> Response:
        return await answer(service, wire_format, request, delivery)

    async def count_tokens(request: Request) -> Response:
        return await token_count(service, wire_format, request)

    for path in wire_format.paths:
        shown = _operation(wire_format, path, wire_format.request_schema, wire_format.answer_schema, streams=True)
        router.add_api_route(path, answer_request, methods=["POST"], **shown)
    for path in wire_format.count_tokens_paths:
        shown = _operation(wire_format, path, wire_format.count_tokens_schema, wire_format.token_count_schema)
        router.add_api_route(path, count_tokens, methods=["POST"], **shown)
    return router


def _operation(
    wire_format: WireFormat, path: str, body: type[BaseModel] | None, answered: type[BaseModel] | None, **options: Any
) -> dict[str, Any]:
    anthropic = "type" in wire_format.error_body(RequestError(400, ""))
    return operation(body, answered, anthropic=anthropic, tag=wire_format.name, **options)


async def answer(service: ChatService, wire_format: WireFormat, request: Request, delivery: Delivery) -> Response:
    """Checks a request and starts its answer, streamed or whole. Raises RequestError before anything is generated."""
    service.check()
    prepare = partial(service.prepare, wire_format, key=key_of(request.scope) or None)
    async with service.bodies.read(request) as body:
        job = await service.threads.run(prepare, body)
    return delivery.answer(service, job)


async def token_count(service: ChatService, wire_format: WireFormat, request: Request) -> Response:
    """Renders and tokenizes only: it never waits for the engine."""
    count_tokens = partial(service.count_tokens, wire_format, key=key_of(request.scope) or None)
    async with service.bodies.read(request) as body:
        count = await service.threads.run(count_tokens, body)
    return JSONResponse(wire_format.token_count(count))
